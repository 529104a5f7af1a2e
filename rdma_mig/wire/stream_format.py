# SPDX-License-Identifier: Apache-2.0
"""Constants, values and encoders of the QEMU migration stream up to the end of the RAM section.

:mod:`rdma_mig.wire.stream` exports all of this beside the parser; import from there.

Wire: docs/protocol.md, stream; migration.h for the names that it defines.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from rdma_mig.errors import LocalProtocolError
from rdma_mig.wire.fields import U16_MAX, check_uint, encode_text
from rdma_mig.wire.records import MAX_RAM_BLOCKS

QEMU_VM_FILE_MAGIC = 0x5145564D
QEMU_VM_FILE_VERSION_COMPAT = 0x00000002
QEMU_VM_FILE_VERSION = 0x00000003

QEMU_VM_EOF = 0x00
QEMU_VM_SECTION_START = 0x01
QEMU_VM_SECTION_PART = 0x02
QEMU_VM_SECTION_END = 0x03
QEMU_VM_SECTION_FULL = 0x04
QEMU_VM_SUBSECTION = 0x05
QEMU_VM_VMDESCRIPTION = 0x06
QEMU_VM_CONFIGURATION = 0x07
QEMU_VM_COMMAND = 0x08
QEMU_VM_SECTION_FOOTER = 0x7E

RAM_SAVE_FLAG_FULL = 0x01
RAM_SAVE_FLAG_ZERO = 0x02
RAM_SAVE_FLAG_MEM_SIZE = 0x04
RAM_SAVE_FLAG_PAGE = 0x08
RAM_SAVE_FLAG_EOS = 0x10
RAM_SAVE_FLAG_CONTINUE = 0x20
RAM_SAVE_FLAG_XBZRLE = 0x40
RAM_SAVE_FLAG_HOOK = 0x80
RAM_SAVE_FLAG_COMPRESS_PAGE = 0x100
RAM_SAVE_FLAG_MULTIFD_FLUSH = 0x200

#: idstr, instance and version of the RAM section; no other instance or version exists.
RAM_IDSTR = "ram"
RAM_INSTANCE_ID = 0
RAM_VERSION = 4
#: Bytes of the smallest target page of x86: what lengths of RAM blocks are multiples of.
PAGE_SIZE = 4096
#: Bytes of all RAM at most: no processor has physical addresses of more bits.
RAM_TOTAL_MAX = 1 << 56
#: Bytes of the machine name, and of one configuration subsection.
CONFIGURATION_MAX = 4096
#: Bytes of a name that a length byte precedes.
STR8_MAX = 255

CAPABILITY_IGNORE_SHARED = "x-ignore-shared"

U8 = struct.Struct(">B")
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")


class CommandType(IntEnum):
    """Commands between sections. Wire: docs/protocol.md, stream."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


@dataclass(frozen=True, slots=True)
class TargetPageBits:
    """Configuration subsection: log2 of the target page size, 10 to 30."""

    bits: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Configuration subsection: capabilities that the destination must have too."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MachineUuid:
    """Configuration subsection: UUID of the machine, 16 bytes."""

    value: bytes


Subsection = TargetPageBits | Capabilities | MachineUuid


@dataclass(frozen=True, slots=True)
class StreamBlock:
    """A RAM block as the stream lists it.

    Args:
        idstr: its name, 1 to 255 bytes of printable UTF-8.
        length: bytes, a positive multiple of 4096.
        page_size: for the holder's own use, never on the wire: only streams with postcopy list
            page sizes, and those are refused.
        guest_address: u64, listed when x-ignore-shared is on, else None.
    """

    idstr: str
    length: int
    page_size: int | None = None
    guest_address: int | None = None


@dataclass(frozen=True, slots=True)
class StreamHead:
    """Header and configuration section.

    Args:
        raw: the bytes, verbatim.
        machine: machine type such as ``pc-q35-7.2``; None where the source sends no configuration.
        subsections: of the configuration, in order.
    """

    raw: bytes
    machine: str | None
    subsections: tuple[Subsection, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A command: what the source wants the destination to do beside loading."""

    command: CommandType
    data: bytes


@dataclass(frozen=True, slots=True)
class RamStart:
    """The RAM section begins: its ids, bytes in all, and the blocks in stream order."""

    section_id: int
    instance_id: int
    version: int
    total: int
    blocks: tuple[StreamBlock, ...]


@dataclass(frozen=True, slots=True)
class Hook:
    """A registration phase begins on the control channel; the section goes on after it."""


@dataclass(frozen=True, slots=True)
class RamPart:
    """A round of the RAM section begins."""

    section_id: int


@dataclass(frozen=True, slots=True)
class RamEnd:
    """The last part of the RAM section begins."""

    section_id: int


@dataclass(frozen=True, slots=True)
class SectionEnd:
    """A part of the RAM section is over; after kind "end" device state follows."""

    kind: Literal["start", "part", "end"]
    has_footer: bool


Event = StreamHead | Command | RamStart | Hook | RamPart | RamEnd | SectionEnd


def _str8(field: str, text: str) -> bytes:
    raw = encode_text(field, text, STR8_MAX)
    return U8.pack(len(raw)) + raw


def _u32(field: str, value: int) -> bytes:
    check_uint(field, value, 32)
    return U32.pack(value)


def _subsection(section: Subsection) -> tuple[str, bytes]:
    if isinstance(section, TargetPageBits):
        if not isinstance(section.bits, int) or not 10 <= section.bits <= 30:
            raise LocalProtocolError(f"target page bits are {section.bits!r}, allowed are 10 to 30")
        return "configuration/target-page-bits", U32.pack(section.bits)
    if isinstance(section, Capabilities):
        names = b"".join(_str8("capability", name) for name in section.names)
        if len(names) > CONFIGURATION_MAX:
            raise LocalProtocolError(f"capabilities have {len(names)} bytes, allowed are 4096")
        return "configuration/capabilities", U32.pack(len(section.names)) + names
    if len(section.value) != 16:
        raise LocalProtocolError(f"machine UUID has {len(section.value)} bytes, allowed are 16")
    return "configuration/uuid", bytes(section.value)


def encode_head(machine: str | None, subsections: Sequence[Subsection] = ()) -> bytes:
    """Return stream header and configuration section.

    Args:
        machine: machine type; None leaves the configuration out.
        subsections: of the configuration, at most one of each kind.

    Raises:
        LocalProtocolError: a bad value, a kind given twice, or subsections without machine.
    """
    parts = [U32.pack(QEMU_VM_FILE_MAGIC), U32.pack(QEMU_VM_FILE_VERSION)]
    if machine is None:
        if subsections:
            raise LocalProtocolError("configuration subsections need a machine type")
        return b"".join(parts)
    name = encode_text("machine type", machine, CONFIGURATION_MAX)
    parts += [U8.pack(QEMU_VM_CONFIGURATION), U32.pack(len(name)), name]
    seen = set()
    for section in subsections:
        title, fields = _subsection(section)
        if title in seen:
            raise LocalProtocolError(f"{title} is given twice")
        seen.add(title)
        parts += [U8.pack(QEMU_VM_SUBSECTION), _str8("subsection", title), U32.pack(1), fields]
    return b"".join(parts)


def encode_command(command: CommandType, data: bytes = b"") -> bytes:
    """Return a command.

    Raises:
        LocalProtocolError: an unknown command or more than 65535 bytes of data.
    """
    try:
        number = CommandType(command)
    except ValueError:
        raise LocalProtocolError(f"command {command!r} is unknown") from None
    if len(data) > U16_MAX:
        raise LocalProtocolError(f"command has {len(data)} bytes of data, allowed are {U16_MAX}")
    return U8.pack(QEMU_VM_COMMAND) + U16.pack(number) + U16.pack(len(data)) + data


def encode_ram_start(section_id: int, blocks: Sequence[StreamBlock]) -> bytes:
    """Return the RAM section's header and block list, up to where the HOOK word belongs.

    Guest addresses are written when every block has one (x-ignore-shared).

    Args:
        section_id: u32, what PART, END and footers refer to.
        blocks: in stream order, which is the order of block indices.

    Raises:
        LocalProtocolError: no blocks or too many, a bad or repeated name, a bad length, or guest
            addresses for some blocks only.
    """
    if not 1 <= len(blocks) <= MAX_RAM_BLOCKS:
        raise LocalProtocolError(f"{len(blocks)} RAM blocks, allowed are 1 to {MAX_RAM_BLOCKS}")
    addressed = sum(block.guest_address is not None for block in blocks)
    if addressed not in (0, len(blocks)):
        raise LocalProtocolError(f"{addressed} of {len(blocks)} RAM blocks have a guest address")
    total = 0
    names = set()
    listed = []
    for block in blocks:
        name = _str8("RAM block name", block.idstr)
        if block.idstr in names:
            raise LocalProtocolError(f"RAM block {block.idstr!r} is listed twice")
        names.add(block.idstr)
        length = block.length
        if not isinstance(length, int) or length < 1 or length % PAGE_SIZE:
            raise LocalProtocolError(
                f"RAM block {block.idstr!r} has {length!r} bytes, "
                f"allowed are positive multiples of {PAGE_SIZE}"
            )
        total += length
        if total > RAM_TOTAL_MAX:
            raise LocalProtocolError(f"RAM has {total} bytes in all, allowed are 2^56")
        listed += [name, U64.pack(length)]
        if block.guest_address is not None:
            check_uint(f"guest address of {block.idstr!r}", block.guest_address, 64)
            listed.append(U64.pack(block.guest_address))
    return b"".join(
        [
            U8.pack(QEMU_VM_SECTION_START),
            _u32("section id", section_id),
            _str8("section name", RAM_IDSTR),
            U32.pack(RAM_INSTANCE_ID),
            U32.pack(RAM_VERSION),
            U64.pack(total | RAM_SAVE_FLAG_MEM_SIZE),
            *listed,
        ]
    )


def encode_hook() -> bytes:
    """Return the word that begins a registration phase; it must be the last of its message."""
    return U64.pack(RAM_SAVE_FLAG_HOOK)


def encode_eos() -> bytes:
    """Return the word that ends a part of the RAM section."""
    return U64.pack(RAM_SAVE_FLAG_EOS)


def encode_footer(section_id: int) -> bytes:
    """Return a section footer.

    Raises:
        LocalProtocolError: an id that does not fit 32 bits.
    """
    return U8.pack(QEMU_VM_SECTION_FOOTER) + _u32("section id", section_id)


def encode_section_part(section_id: int) -> bytes:
    """Return the header of a round.

    Raises:
        LocalProtocolError: an id that does not fit 32 bits.
    """
    return U8.pack(QEMU_VM_SECTION_PART) + _u32("section id", section_id)


def encode_section_end(section_id: int) -> bytes:
    """Return the header of the last part of a section.

    Raises:
        LocalProtocolError: an id that does not fit 32 bits.
    """
    return U8.pack(QEMU_VM_SECTION_END) + _u32("section id", section_id)
