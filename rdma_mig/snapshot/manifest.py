# SPDX-License-Identifier: Apache-2.0
"""The manifest of a snapshot directory: what is in it, and what it must hash to.

It holds nothing but what follows from the migration's bytes (no time, no host name), in one
canonical form, so that two snapshots of the same bytes are equal files.

Chunk digests are not in here: 32 hex digits for every MiB would make 32 MiB of JSON for a guest
of 1 TiB, which every ``inspect`` would have to parse. They lie in ``ram/N.xxh3``, 16 bytes a
chunk in order (xxh3-128, big-endian; 16 zero bytes for a chunk that is wholly zero), and the
manifest has the sha256 of that file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from rdma_mig.errors import SnapshotError
from rdma_mig.memory.blocks import CHUNK_SIZE, RamBlock

__all__ = [
    "COMMAND",
    "CONFIG",
    "DESCRIPTION",
    "DEVICE_STATE",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "MAX_BLOCKS",
    "MAX_DEVICE_STATE",
    "MAX_HEAD",
    "MAX_MANIFEST",
    "RAM",
    "WRITTEN",
    "BlockRecord",
    "FileRecord",
    "Manifest",
    "SharedBlock",
    "StreamFacts",
    "digest_file",
    "ram_file",
]

FORMAT: Final = "rdma-mig-snapshot"
FORMAT_VERSION: Final = 2
"""The newest version that is read; what needs nothing of it is written as an older one."""
STREAM_VERSION: Final = 3
RAM_SECTION_VERSION: Final = 4
DIGEST_ALGORITHM: Final = "xxh3-128"

MANIFEST: Final = "manifest.json"
CONFIG: Final = "config.bin"
RAM: Final = "ram"
DEVICE_STATE: Final = "vmstate.bin"
DESCRIPTION: Final = "vmdesc.json"
RESTORED: Final = "restored"
COMMAND: Final = "command.json"
"""How the QEMU was started, where that is known."""
WRITTEN: Final = "written.json"
"""In what a run has left: that RAM is on disk, and all that the manifest says but device state."""

MAX_MANIFEST = 16 << 20
MAX_BLOCKS = 4096
MAX_HEAD = 16 << 20
"""Most bytes of ``config.bin``."""
MAX_DEVICE_STATE = 1 << 30
"""Most bytes of ``vmstate.bin`` and of ``vmdesc.json``: what is read into memory at once."""

_HEX = re.compile(r"[0-9a-f]{64}")


def ram_file(index: int) -> str:
    """The RAM file of block ``index``, in the directory ``ram``."""
    return f"{index}.raw"


def digest_file(index: int) -> str:
    """The chunk digests of block ``index``, in the directory ``ram``."""
    return f"{index}.xxh3"


class _Bad(Exception):
    """What is wrong with a manifest."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of a file that is kept verbatim."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """A RAM block, how many bytes of it lie in pages that are not zero, and its digests' sha256."""

    block: RamBlock
    data_bytes: int
    digests_sha256: str


@dataclass(frozen=True, slots=True)
class SharedBlock:
    """A RAM block that the source listed and did not send: others share its memory.

    Attributes:
        position: in the source's list, shared blocks counted.
        block: name, length, and guest address.
    """

    position: int
    block: RamBlock


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What a manifest takes from the stream's head and sections.

    Attributes:
        machine: the versioned machine type of the configuration section, e.g. ``pc-q35-7.2``.
        ram_section_id: the section id the source gave to RAM; others refer to it.
        footers: whether sections end in a footer.
        shared: the RAM blocks that were listed and not sent (x-ignore-shared), in stream order.
        page_bits: log2 of the target page size.
    """

    machine: str
    ram_section_id: int
    footers: bool
    shared: tuple[SharedBlock, ...] = ()
    page_bits: int = 12


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that ``manifest.json`` says.

    Attributes:
        machine: the versioned machine type of the configuration section, e.g. ``pc-q35-7.2``.
        ram_section_id: the section id the source gave to RAM; others refer to it.
        footers: whether sections end in a footer.
        page_bits: log2 of the target page size.
        blocks: the RAM blocks that are kept, in stream order.
        config: the stream's head: header and configuration section.
        device_state: everything after RAM's END section.
        eof_offset: the offset in the device state right after its EOF byte, where the description
            begins.
        description: the description's JSON text; None when the source sent none.
        shared: the RAM blocks that were listed and not sent (x-ignore-shared), in stream order.
    """

    machine: str
    ram_section_id: int
    footers: bool
    page_bits: int
    blocks: tuple[BlockRecord, ...]
    config: FileRecord
    device_state: FileRecord
    eof_offset: int
    description: FileRecord | None
    shared: tuple[SharedBlock, ...] = ()

    @property
    def version(self) -> int:
        """The format version: 2 with shared blocks, which a reader of version 1 would lose."""
        return 2 if self.shared else 1

    @property
    def listed(self) -> tuple[tuple[RamBlock, bool], ...]:
        """All blocks that the source listed, in its order, and whether each is shared."""
        blocks = [(record.block, False) for record in self.blocks]
        for shared in self.shared:
            blocks.insert(shared.position, (shared.block, True))
        return tuple(blocks)

    def encode(self) -> bytes:
        """The file's bytes: ASCII JSON, sorted keys, two spaces, a newline at the end."""
        files: dict[str, dict[str, Any]] = {
            CONFIG: {"size": self.config.size, "sha256": self.config.sha256},
            DEVICE_STATE: {
                "size": self.device_state.size,
                "sha256": self.device_state.sha256,
                "eof_offset": self.eof_offset,
            },
        }
        if self.description is not None:
            files[DESCRIPTION] = {
                "size": self.description.size,
                "sha256": self.description.sha256,
            }
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "machine": self.machine,
            "stream": {
                "version": STREAM_VERSION,
                "ram_section_id": self.ram_section_id,
                "ram_section_version": RAM_SECTION_VERSION,
                "footers": self.footers,
                "page_bits": self.page_bits,
            },
            "blocks": [
                {
                    "name": record.block.idstr,
                    "length": record.block.length,
                    "page_size": record.block.page_size,
                    "guest_address": record.block.guest_address,
                    "file": f"{RAM}/{ram_file(index)}",
                    "data_bytes": record.data_bytes,
                    "digests": {
                        "algorithm": DIGEST_ALGORITHM,
                        "chunk_size": CHUNK_SIZE,
                        "file": f"{RAM}/{digest_file(index)}",
                        "sha256": record.digests_sha256,
                    },
                }
                for index, record in enumerate(self.blocks)
            ],
            "files": files,
        }
        if self.shared:
            content["shared_blocks"] = [
                {
                    "position": shared.position,
                    "name": shared.block.idstr,
                    "length": shared.block.length,
                    "page_size": shared.block.page_size,
                    "guest_address": shared.block.guest_address,
                }
                for shared in self.shared
            ]
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")

    @classmethod
    def decode(cls, raw: bytes, path: str) -> Manifest:
        """Read a manifest, accepting nothing that this version would not have written.

        Args:
            raw: the file's bytes.
            path: the file, for the message.

        Raises:
            SnapshotError: not JSON, not ours, of a newer version, or a value out of range.
        """
        try:
            content = json.loads(
                raw.decode("utf-8"),
                object_pairs_hook=_no_duplicates,
                parse_constant=_no_constant,
            )
        except (ValueError, RecursionError, _Bad):
            raise SnapshotError(
                f"{path} is not JSON: it is damaged, or this is no snapshot",
                remedy="check that the path is a directory that rdma-migrate wrote",
            ) from None
        version = content.get("version") if isinstance(content, dict) else None
        if (
            not isinstance(content, dict)
            or content.get("format") != FORMAT
            or type(version) is not int
            or version < 1
        ):
            raise SnapshotError(
                f"{path} is not the manifest of an rdma-mig snapshot",
                remedy="check that the path is a directory that rdma-migrate wrote",
            )
        if version > FORMAT_VERSION:
            raise SnapshotError(
                f"{path} has format version {str(version)[:20]}, this rdma-mig reads "
                f"1 to {FORMAT_VERSION}",
                remedy="use the rdma-mig that wrote it, or a newer one",
            )
        try:
            return _manifest(content)
        except (_Bad, ValueError) as error:
            raise SnapshotError(
                f"{path} is damaged: {error}",
                remedy="restore it from a copy, or take the snapshot again",
            ) from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Bad("a key occurs twice")
    return result


def _no_constant(name: str) -> Any:
    raise _Bad(f"{name} is not JSON")


def _object(value: Any, where: str, keys: Iterable[str], optional: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(f"{where} is not an object")
    wanted = set(keys)
    missing, unknown = wanted - value.keys(), value.keys() - wanted - {optional}
    if missing:
        raise _Bad(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown:
        # A key we do not know could change the meaning of those we do.
        raise _Bad(f"{where} has an unknown field {min(unknown)[:40]!a}")
    return value


def _int(value: Any, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _Bad(f"{where} is not a number from {low} to {high}")
    return value


def _exactly(value: Any, where: str, wanted: str | int) -> None:
    if type(value) is not type(wanted) or value != wanted:
        raise _Bad(f"{where} is not {wanted!r}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"{where} is not a string")
    try:
        size = len(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= 255:
        raise _Bad(f"{where} is not a string of 1 to 255 bytes")
    return value


def _sha256(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise _Bad(f"{where} is not a sha256 in hex")
    return value


def _optional_int(value: Any, where: str) -> int | None:
    return None if value is None else _int(value, where, 0, (1 << 64) - 1)


def _file(value: Any, where: str, most: int, *more: str) -> FileRecord:
    fields = _object(value, where, ("size", "sha256", *more))
    return FileRecord(
        _int(fields["size"], f"size of {where}", 0, most),
        _sha256(fields["sha256"], f"sha256 of {where}"),
    )


def _ram_block(fields: dict[str, Any], where: str) -> RamBlock:
    return RamBlock(
        _text(fields["name"], f"name of {where}"),
        _int(fields["length"], f"length of {where}", 1, 1 << 64),
        _optional_int(fields["page_size"], f"page size of {where}"),
        _optional_int(fields["guest_address"], f"guest address of {where}"),
    )


def _shared(value: Any, index: int, listed: int) -> SharedBlock:
    where = f"shared block {index}"
    fields = _object(value, where, ("position", "name", "length", "page_size", "guest_address"))
    return SharedBlock(
        _int(fields["position"], f"position of {where}", 0, listed - 1), _ram_block(fields, where)
    )


def _block(value: Any, index: int) -> BlockRecord:
    where = f"block {index}"
    fields = _object(
        value,
        where,
        ("name", "length", "page_size", "guest_address", "file", "data_bytes", "digests"),
    )
    digests = _object(
        fields["digests"], f"digests of {where}", ("algorithm", "chunk_size", "file", "sha256")
    )
    _exactly(fields["file"], f"file of {where}", f"{RAM}/{ram_file(index)}")
    _exactly(digests["file"], f"digest file of {where}", f"{RAM}/{digest_file(index)}")
    _exactly(digests["algorithm"], f"digest algorithm of {where}", DIGEST_ALGORITHM)
    _exactly(digests["chunk_size"], f"chunk size of {where}", CHUNK_SIZE)
    block = _ram_block(fields, where)
    return BlockRecord(
        block,
        _int(fields["data_bytes"], f"data bytes of {where}", 0, block.length),
        _sha256(digests["sha256"], f"digest of {where}"),
    )


def _shared_blocks(values: Any, kept: int) -> tuple[SharedBlock, ...]:
    if not isinstance(values, list) or len(values) + kept > MAX_BLOCKS:
        raise _Bad(f"blocks and shared_blocks are not lists of {MAX_BLOCKS} at most")
    shared = tuple(_shared(value, at, kept + len(values)) for at, value in enumerate(values))
    positions = [each.position for each in shared]
    if positions != sorted(set(positions)):
        raise _Bad("the positions of shared blocks do not increase")
    return shared


def _manifest(content: dict[str, Any]) -> Manifest:
    keys = ["format", "version", "machine", "stream", "blocks", "files"]
    if content["version"] == 2:
        keys.append("shared_blocks")
    _object(content, "the manifest", keys)
    stream = _object(
        content["stream"],
        "stream",
        ("version", "ram_section_id", "ram_section_version", "footers", "page_bits"),
    )
    _exactly(stream["version"], "version of stream", STREAM_VERSION)
    _exactly(stream["ram_section_version"], "RAM section version", RAM_SECTION_VERSION)
    if not isinstance(stream["footers"], bool):
        raise _Bad("footers is neither true nor false")
    blocks = content["blocks"]
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= MAX_BLOCKS:
        raise _Bad(f"blocks is not a list of 1 to {MAX_BLOCKS}")
    records = tuple(_block(value, index) for index, value in enumerate(blocks))
    shared = _shared_blocks(content.get("shared_blocks", []), len(records))
    if content["version"] == 2 and not shared:
        raise _Bad("no block is shared, which is version 1")
    names = [record.block.idstr for record in records] + [each.block.idstr for each in shared]
    if len(set(names)) != len(names):
        raise _Bad("two blocks have one name")
    files = _object(content["files"], "files", (CONFIG, DEVICE_STATE), DESCRIPTION)
    state = _file(files[DEVICE_STATE], DEVICE_STATE, MAX_DEVICE_STATE, "eof_offset")
    return Manifest(
        machine=_text(content["machine"], "machine"),
        ram_section_id=_int(stream["ram_section_id"], "RAM section id", 0, (1 << 32) - 1),
        footers=stream["footers"],
        page_bits=_int(stream["page_bits"], "page bits", 10, 30),
        blocks=records,
        config=_file(files[CONFIG], CONFIG, MAX_HEAD),
        device_state=state,
        eof_offset=_int(files[DEVICE_STATE]["eof_offset"], "eof_offset", 1, state.size),
        description=(
            _file(files[DESCRIPTION], DESCRIPTION, MAX_DEVICE_STATE)
            if DESCRIPTION in files
            else None
        ),
        shared=shared,
    )
