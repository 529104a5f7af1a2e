# SPDX-License-Identifier: Apache-2.0
"""Streams that are cut, flipped or lie: one failure that says where and what was due, by each
engine that loads; memory stays as it was, and nothing half loaded has a name or runs."""

from __future__ import annotations

import random
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from rdma_mig.errors import HostError, MigrationError, ProtocolError, RemoteProtocolError, StreamCut
from rdma_mig.memory.blocks import RamBlock
from rdma_mig.memory.page_stream import PageWriter
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration import take_over
from rdma_mig.migration.channels import start_incoming
from rdma_mig.migration.guests import ProcessGuest, SnapshotGuest
from rdma_mig.migration.load import LiveDestination
from rdma_mig.migration.receive import SnapshotDestination
from rdma_mig.migration.state import Migration
from rdma_mig.snapshot import Snapshot
from rdma_mig.wire.device_state import encode_sole_device
from rdma_mig.wire.stream import (
    StreamBlock,
    encode_eos,
    encode_footer,
    encode_head,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)
from rdma_mig.wire.uri import FileAddress

MIB = 1 << 20
MACHINE = "pc-i440fx-7.2"
BLOCKS = (("pc.ram", 64 << 10), ("vga", 8 << 10))
PAYLOAD = bytes(range(1, 200))
DEVICES = encode_sole_device("process", PAYLOAD, section_id=3)
BREAK = encode_eos() + encode_footer(2)
#: What a failed attempt may take beside what the process had; a guest has 72 KiB.
MEMORY = 16 * MIB


def pages(blocks: Sequence[tuple[str, int]] = BLOCKS) -> bytes:
    with GuestRam([RamBlock(name, length, None, None) for name, length in blocks]) as ram:
        for guest in ram:
            with guest.memory.view() as view:
                view[: len(view) // 2] = random.Random(guest.index).randbytes(len(view) // 2)
        writer = PageWriter(ram)
        return b"".join(bytes(piece) for guest in ram for piece in writer.pieces(guest.index))


def listing(blocks: Sequence[tuple[str, int]], total: int | None = None) -> bytes:
    """The RAM section's begin; by hand, since ours would refuse to say some of it."""
    names = b"".join(
        bytes([len(name)]) + name.encode() + struct.pack(">Q", length) for name, length in blocks
    )
    if total is None:
        total = sum(length for _, length in blocks)
    head = encode_ram_start(2, [StreamBlock("x", 4096)])[: -(8 + 2 + 8)]
    return head + struct.pack(">Q", total | 4) + names


HEAD = encode_head(MACHINE)
LIST = listing(BLOCKS)
BEGIN = HEAD + LIST + BREAK + encode_section_end(2)
PAGES = pages()


def pieces() -> list[bytes]:
    """The parts of a whole stream, cut at the borders of its sections."""
    return [
        HEAD,
        LIST,
        BREAK,
        encode_section_end(2),
        PAGES,
        BREAK,
        DEVICES.raw[: DEVICES.eof_offset - 1],
        b"\0",
        DEVICES.raw[DEVICES.eof_offset :],
    ]


WHOLE = b"".join(pieces())


def word(value: int, name: str = "") -> bytes:
    """The word before a page, and the name of its block."""
    return struct.pack(">Q", value) + (bytes([len(name)]) + name.encode() if name else b"")


# ---- the engines ----


class Process(ProcessGuest):
    """Notes whether it was loaded, and whether it runs."""

    def __init__(self) -> None:
        super().__init__(MACHINE, [RamBlock(name, length) for name, length in BLOCKS])
        self.loaded: bytes | None = None
        self.runs = False

    def load_state(self, state: bytes) -> None:
        self.loaded = state

    def resume(self) -> None:
        self.runs = True


def run(room: Path, stream: bytes, process: Callable) -> None:
    source = room / "stream"
    source.write_bytes(stream)
    with Migration() as migration:
        start_incoming(FileAddress(str(source)), migration=migration, process=process)
        migration.wait()


def into_snapshot(room: Path, stream: bytes) -> None:
    destination = SnapshotDestination(room / "kept")
    try:
        run(room, stream, destination.process)
    finally:
        destination.close()


def into_snapshot_guest(room: Path, stream: bytes) -> None:
    with SnapshotGuest(room / "kept") as guest:
        run(room, stream, LiveDestination(guest).process)


def into_process(room: Path, stream: bytes) -> None:
    with Process() as guest:
        try:
            run(room, stream, LiveDestination(guest).process)
        except MigrationError:
            assert guest.loaded is None
            assert not guest.runs
            raise
        assert guest.runs


ENGINES = {
    "snapshot": into_snapshot,
    "live-process": into_process,
    "live-snapshot": into_snapshot_guest,
}


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def room() -> Iterator[Path]:
    """A directory in memory: thousands of attempts would wait for a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def attempt(room: Path, stream: bytes, engine: str) -> MigrationError | None:
    """Load a stream; return the failure, which has left nothing, or None."""
    try:
        ENGINES[engine](room, stream)
    except MigrationError as error:
        assert_clean(room, stream, error)
        return error
    if engine != "live-process":
        with Snapshot.open(room / "kept") as snapshot:
            snapshot.verify()
    return None


def assert_clean(room: Path, stream: bytes, error: MigrationError) -> None:
    """Check that a failure has left nothing and, if the stream is wrong, says where it is."""
    assert [path.name for path in room.iterdir()] == ["stream"]
    assert "unexpected" not in str(error)
    if isinstance(error, RemoteProtocolError):
        assert 0 <= error.at <= len(stream)
        assert re.search(rf"\bbyte {error.at}\b", str(error)), str(error)


@contextmanager
def bounded(size: int = MEMORY) -> Iterator[None]:
    """Fail if the process takes more than this beside what it has, shared memory included."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < size


def memory(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) * 1024


def test_whole_stream_is_loaded(tmp_path: Path, engine: str):
    assert attempt(tmp_path, WHOLE, engine) is None
    if engine != "live-process":
        with Snapshot.open(tmp_path / "kept") as snapshot:
            assert [(b.idstr, b.length) for b in snapshot.blocks] == list(BLOCKS)


def test_memory_is_really_measured():
    with pytest.raises(AssertionError), bounded(), GuestRam([RamBlock("x", 2 * MEMORY)]) as ram:
        ram.populate(lambda: False)


@pytest.mark.parametrize("engine", ["snapshot", "live-process"])
def test_stream_that_is_cut_is_refused_wherever_that_is(room: Path, engine: str):
    borders = [sum(map(len, pieces()[:count])) for count in range(len(pieces()))]
    anywhere = random.Random(1).sample(range(len(WHOLE)), 2000)
    awaited = set()
    with bounded():
        for at in sorted({*borders, *anywhere, len(WHOLE) - 1}):
            error = attempt(room, WHOLE[:at], engine)
            assert isinstance(error, StreamCut)
            assert error.at == at
            awaited.add(error.message.partition("awaited was ")[2])
    assert awaited >= {
        "the stream header",
        "the configuration section",
        "a section or command",
        "the RAM block list",
        "pages, or the EOS of the RAM section",
        "the rest of the device state",
        "the description behind the device state",
    }


def test_bytes_behind_the_end_are_refused(tmp_path: Path, engine: str):
    error = attempt(tmp_path, WHOLE + b"\0", engine)
    assert isinstance(error, ProtocolError)


@pytest.mark.parametrize("engine", ["snapshot", "live-process"])
def test_bits_that_are_flipped_end_whole_or_in_one_failure(room: Path, engine: str):
    """A bit of a page's bytes is not to be noticed; one of the stream's own must not be harm."""
    chance = random.Random(2)
    framing = [at for at in range(len(WHOLE)) if not len(BEGIN) <= at < len(BEGIN) + len(PAGES)]
    refused = 0
    with bounded():
        for count in range(250):
            place = room / str(count)
            place.mkdir()
            stream = bytearray(WHOLE)
            at = chance.choice(framing) if count % 2 else chance.randrange(len(WHOLE))
            stream[at] ^= 1 << chance.randrange(8)
            error = attempt(place, bytes(stream), engine)
            if error is not None:
                assert isinstance(error, (ProtocolError, HostError)), error
                refused += 1
    assert refused > 40


# ---- what lies ----


class Lie(NamedTuple):
    """A stream with something wrong in it.

    Attributes:
        stream: all of it.
        at: where what is wrong begins.
        said: what is said of it; by a process, if that knows better, the second.
    """

    stream: bytes
    at: int
    said: tuple[str, ...]


def lie(before: bytes, wrong: bytes, *said: str, skip: int = 0, after: bytes = b"") -> Lie:
    """One whose wrong field begins ``skip`` bytes into ``wrong``."""
    return Lie(before + wrong + after, len(before) + skip, said)


CONFIGURATION = HEAD[:8] + b"\x07"
RAM_WORD = len(LIST) - sum(1 + len(name) + 8 for name, _ in BLOCKS) - 8
RAM_SECTION = len(b"\x01") + 4
SECTION = struct.pack(">I", 2)
REST = BREAK + DEVICES.raw
FULL = b"\xff" * 4

LIES = {
    # Sizes.
    "RAM of 2^60 bytes": lie(HEAD, listing([("pc.ram", 1 << 60)]), "allowed are", skip=RAM_WORD),
    "block of 2^60 bytes in less RAM": lie(
        HEAD, listing([("pc.ram", 1 << 60)], 72 << 10), "multiples of 4096 up to 73728",
        skip=RAM_WORD + 8 + 7,
    ),
    "block of part of a page": lie(
        HEAD, listing([("pc.ram", 4097)], 8192), "multiples of 4096", skip=RAM_WORD + 8 + 7
    ),
    "machine type of 4 GiB": lie(
        CONFIGURATION, FULL, "machine type has 4294967295 bytes, allowed are 1 to 4096",
        after=b"x" * MIB,
    ),
    "capabilities without number": lie(
        HEAD + b"\x05\x1aconfiguration/capabilities" + struct.pack(">I", 1),
        FULL + b"\x04abcd" * 100_000, "capabilities have", skip=4 + 5 * 820 - 4,
    ),
    "command of 64 KiB": lie(
        HEAD, b"\x08" + struct.pack(">HH", 2, 0xFFFF), "command PING has 65535 bytes", skip=3
    ),
    "XBZRLE page of 64 KiB": lie(
        BEGIN, word(0x40, "pc.ram") + b"\x01\xff\xff", "more than 4096 encoded bytes",
        after=bytes(70_000),
    ),
    "XBZRLE runs beyond the page": lie(
        BEGIN, word(0x40, "pc.ram") + b"\x01\x00\x03\xff\x7f\x01", "XBZRLE page is broken"
    ),
    "XBZRLE run beyond its record": lie(
        BEGIN, word(0x40, "pc.ram") + b"\x01\x00\x03\x00\x09a", "XBZRLE page is broken",
        after=bytes(4096),
    ),
    "XBZRLE page of another encoding": lie(
        BEGIN, word(0x40, "pc.ram") + b"\x02\x00\x02\x01\x01", "another encoding than 1"
    ),
    # Blocks.
    "block listed twice": lie(
        HEAD, listing([("pc.ram", 4096), ("pc.ram", 4096)]), "'pc.ram' is listed twice",
        skip=len(listing([("pc.ram", 4096)])) + 1,
    ),
    "page of no listed block": lie(
        BEGIN, word(0x8, "rom") + bytes(4096), "'rom' came, which was not listed"
    ),
    "page that names no block": lie(
        BEGIN, word(0x28) + bytes(4096), "does not name its RAM block"
    ),
    "page beyond its block": lie(
        BEGIN, word(1 << 20 | 8, "pc.ram") + bytes(4096), "came for offset 0x100000"
    ),
    "no pages": lie(BEGIN, BREAK, "sent 0 of 18 pages", "none of block 'pc.ram'", skip=9),
    "no page of one block": lie(
        BEGIN, pages(BLOCKS[:1]) + REST, "sent 16 of 18 pages", "none of block 'vga'",
        skip=len(pages(BLOCKS[:1])) + 9,
    ),
    # Sections.
    "byte that begins no section": lie(HEAD, b"\x09", "0x09 where a section or command begins"),
    "section of another device": lie(
        HEAD, b"\x04" + SECTION + b"\x05block" + bytes(8), "section 'block' comes before",
        skip=5 + 6 + 4,
    ),
    "RAM of another version": lie(
        HEAD, LIST[: RAM_WORD - 4] + struct.pack(">I", 3), "version 3, allowed is 4",
        skip=RAM_WORD - 4,
    ),
    "RAM twice": lie(HEAD + LIST + BREAK, LIST, "the RAM section starts twice", skip=RAM_WORD - 4),
    "part of a section that is none": lie(
        HEAD + LIST + BREAK, encode_section_part(7), "PART of section 7, RAM is section 2", skip=1
    ),
    "footer of another section": lie(
        HEAD + LIST + encode_eos(), encode_footer(9), "footer names section 9", skip=1
    ),
    "end before the end": lie(HEAD + LIST + BREAK, b"\0", "ends before the end of the RAM section"),
    "RAM word of RDMA": lie(BEGIN, word(0x80), "does not run over RDMA"),
    "RAM word of no meaning": lie(BEGIN, word(0x800), "RAM section has word 0x800, allowed are"),
    "compressed page": lie(BEGIN, word(0x100, "pc.ram") + bytes(64), "COMPRESS_PAGE"),
    # What it is.
    "no stream": lie(b"", b"GET / HTTP/1.1\r\n", "stream begins with 0x47455420"),
    "stream of version 2": lie(HEAD[:4], struct.pack(">I", 2), "version is 2"),
}  # fmt: skip
PROCESS_LIES = {
    "another machine": lie(encode_head("q35"), LIST, "has machine 'q35', this is 'pc-i440fx-7.2'"),
    "block that is missing": lie(HEAD, listing(BLOCKS[:1]), "has RAM blocks 'pc.ram' of 65536"),
    "block of another length": lie(
        HEAD, listing([BLOCKS[0], ("vga", 4096)]), "has RAM blocks 'pc.ram' of 65536"
    ),
    "another device": lie(
        BEGIN + PAGES + BREAK, encode_sole_device("disk", b"x", section_id=3).raw, "the one device"
    ),
}


@pytest.mark.parametrize("name", list(LIES))
def test_what_lies_is_refused_where_it_does(tmp_path: Path, engine: str, name: str):
    stream, at, said = LIES[name]
    with bounded():
        error = attempt(tmp_path, stream, engine)
    assert isinstance(error, RemoteProtocolError), error
    for text in said:
        assert text in str(error)
    assert error.at == at


@pytest.mark.parametrize("name", list(PROCESS_LIES))
def test_what_does_not_fit_a_process_is_refused(tmp_path: Path, name: str):
    stream, _, said = PROCESS_LIES[name]
    error = attempt(tmp_path, stream, "live-process")
    assert isinstance(error, RemoteProtocolError)
    assert said[0] in str(error)


def test_machine_type_that_is_missing_is_noticed(tmp_path: Path, engine: str):
    error = attempt(tmp_path, HEAD[:8] + WHOLE[len(HEAD) :], engine)
    assert isinstance(error, RemoteProtocolError)
    assert "machine" in str(error)


@pytest.mark.parametrize("engine", ["snapshot", "live-snapshot"])
def test_guest_that_no_host_has_memory_for_is_refused_at_once(tmp_path: Path, engine: str):
    stream = HEAD + listing([("pc.ram", 1 << 50)]) + BREAK
    with bounded():
        error = attempt(tmp_path, stream, engine)
    assert isinstance(error, HostError)
    assert "MiB available" in str(error)


def test_description_that_announces_4_gib_takes_no_memory(tmp_path: Path, engine: str):
    stream = BEGIN + PAGES + BREAK + DEVICES.raw[: DEVICES.eof_offset] + b"\x06" + FULL + b"{"
    with bounded():
        error = attempt(tmp_path, stream + b" " * MIB, engine)
    assert isinstance(error, StreamCut)


@pytest.mark.parametrize("engine", ["live-process", "live-snapshot"])
def test_device_state_without_end_is_refused(monkeypatch, tmp_path: Path, engine: str):
    monkeypatch.setattr(take_over, "DEVICE_STATE_MAX", MIB)
    stream = BEGIN + PAGES + BREAK + b"\x04" * (64 * MIB)
    with bounded():
        error = attempt(tmp_path, stream, engine)
    assert isinstance(error, RemoteProtocolError)
    assert "more than 1 MiB" in str(error)
    assert MIB < error.at < 3 * MIB
