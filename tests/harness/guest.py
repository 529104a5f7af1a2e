# SPDX-License-Identifier: Apache-2.0
"""The guest: a boot sector that counts in RAM pages and prints the count (guest/boot.S)."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from harness.files import Buffer

PAGE_SIZE = 4096
SECTOR_SIZE = 512
#: Where the firmware puts the sector, guest-physical.
LOAD_ADDRESS = 0x7C00
#: Timer ticks a second: the PC's 1193182 Hz over 65536.
TICKS_PER_SECOND = 18.2

_STEP = 64 << 10

_SOURCE = Path(__file__).with_name("guest") / "boot.S"
#: Where Python patches parameters into a guest's boot sector.
PARAMETERS_AT = 0x1D0
_PARAMETERS = struct.Struct("<4sIII")  # magic, start, pages, pause
_PASSES_AT = PARAMETERS_AT + _PARAMETERS.size
_MAGIC = b"RMG1"
_HEARTBEAT = re.compile(rb"^H ([0-9a-f]{8})$")

# The firmware keeps tables and its stack at the top of low RAM and everything of the PC's past
# below 1 MiB; a guest that counted there would corrupt what its own timer interrupt needs.
_LOWEST_START = 1 << 20
_FIRMWARE_RESERVE = 1 << 20
_REACH = 1 << 32


class CounterError(AssertionError):
    """The counters in guest RAM are not what any stopped instant of the guest could have left."""


class Counters(NamedTuple):
    """What the counters in RAM say about a stopped guest."""

    passes: int
    """Passes that every page has seen."""
    cursor: int
    """Pages that the pass after that has reached."""


@dataclass(frozen=True)
class Guest:
    """What the guest is to do.

    Args:
        start: guest-physical address of the first page that it counts in; a multiple of 4096.
        pages: how many pages it counts in; 0 for an idle guest, which only prints heartbeats.
        pause: timer ticks (55 ms each) that it halts after a pass; 0 for as fast as it can, which
            needs pages to count in.
    """

    start: int = 0
    pages: int = 0
    pause: int = 2

    def __post_init__(self) -> None:
        """Refuse what would overwrite the guest's own code or the firmware."""
        if self.start % PAGE_SIZE or self.start < 0 or self.pages < 0 or self.pause < 0:
            raise ValueError(f"not a range of whole pages, or a negative pause: {self}")
        if self.pages and (self.start < _LOWEST_START or self.end > _REACH):
            raise ValueError(f"the guest can count between 1 MiB and 4 GiB, not in {self}")
        if not self.pages and not self.pause:
            raise ValueError("a guest without pages needs a pause, or it would spin")

    @classmethod
    def idle(cls) -> Guest:
        """A guest that only prints a heartbeat, nine times a second."""
        return cls()

    @classmethod
    def dirtying(cls, mib: int, *, start_mib: int = 16, pause: int = 1) -> Guest:
        """A guest that counts in every page of ``mib`` MiB from ``start_mib`` MiB on.

        With the pause of 1 tick it makes at most 18 passes a second: 4 MiB are 73 MiB/s of dirt.
        """
        return cls(start=start_mib << 20, pages=(mib << 20) // PAGE_SIZE, pause=pause)

    @property
    def end(self) -> int:
        """Guest-physical address behind the last page that it counts in."""
        return self.start + self.pages * PAGE_SIZE

    def check_fits(self, memory_size: int) -> None:
        """Raise ValueError when a machine with ``memory_size`` bytes is too small for it."""
        if self.pages and self.end > memory_size - _FIRMWARE_RESERVE:
            raise ValueError(
                f"a guest that counts up to {self.end:#x} does not fit into {memory_size:#x} bytes"
            )

    def image(self) -> bytes:
        """The boot sector with these parameters in it: 512 bytes."""
        sector = bytearray(assembled(_SOURCE, _MAGIC))
        _PARAMETERS.pack_into(sector, PARAMETERS_AT, _MAGIC, self.start, self.pages, self.pause)
        return bytes(sector)


@cache
def assembled(source: Path, magic: bytes) -> bytes:
    """Assemble a guest of one boot sector, whose parameters begin with ``magic`` at 0x1d0.

    An image of it beside the source serves where there is no assembler, as in a container.
    """
    prepared = source.with_suffix(".bin")
    if prepared.exists():
        sector = prepared.read_bytes()
    else:
        with tempfile.TemporaryDirectory(prefix="rdma-mig-guest-") as directory:
            object_file, image = Path(directory, "guest.o"), Path(directory, "guest.bin")
            assemble = ["as", "--32", "-I", _SOURCE.parent, "-o", object_file, source]
            link = ["ld", "-m", "elf_i386", "-Ttext", hex(LOAD_ADDRESS), "--oformat", "binary"]
            subprocess.run(assemble, check=True, timeout=60)
            subprocess.run([*link, "-o", image, object_file], check=True, timeout=60)
            sector = image.read_bytes()
    if len(sector) != SECTOR_SIZE or sector[PARAMETERS_AT:][: len(magic)] != magic:
        raise ValueError(f"{source} did not assemble to a boot sector with its parameters")
    return sector


def check_counters(memory: Buffer, start: int, pages: int) -> Counters:
    """Check the counters of a stopped guest, ``pages`` of them from offset ``start`` of ``memory``.

    Args:
        memory: guest RAM, or a part of it, from guest-physical address 0 when ``start`` is one.
        start: offset of the first page in ``memory``, bytes.
        pages: number of pages.

    Raises:
        CounterError: when they do not read n + 1 up to some page and n from there on.
        ValueError: when ``memory`` does not hold that many pages.
    """
    end = start + pages * PAGE_SIZE
    if pages < 1 or start < 0 or end > len(memory):
        raise ValueError(f"no {pages} pages at {start:#x} in {len(memory)} bytes")
    counters: list[int] = []
    for offset in range(start, end, _STEP):
        words = memoryview(memory[offset : min(offset + _STEP, end)]).cast("I")
        counters += words[:: PAGE_SIZE // words.itemsize].tolist()
    passes = counters[-1]
    # The first page that the pass under way has not reached; they all agree between two passes.
    cursor = next((i for i, counter in enumerate(counters) if counter != passes + 1), pages)
    for page in range(cursor, pages):
        if counters[page] != passes:
            raise CounterError(
                f"page {page} of {pages} (at {start + page * PAGE_SIZE:#x}) counts "
                f"{counters[page]}, where {passes} is due: pages 0 to {cursor - 1} count "
                f"{passes + 1}, the last one {passes}"
            )
    return Counters(passes, cursor)


def guest_counters(memory: Buffer, guest: Guest) -> Counters:
    """As check_counters, and check them against the guest's own variable in RAM as well.

    ``memory`` is guest RAM from guest-physical address 0. Of an idle guest, which has no pages,
    the variable is all that there is.
    """
    raw = bytes(memory[LOAD_ADDRESS : LOAD_ADDRESS + SECTOR_SIZE])
    magic, start, pages, _ = _PARAMETERS.unpack_from(raw, PARAMETERS_AT)
    if (magic, start, pages) != (_MAGIC, guest.start, guest.pages):
        raise CounterError(f"in RAM is not the boot sector of {guest}: {raw[PARAMETERS_AT:]!r}")
    (begun,) = struct.unpack_from("<I", raw, _PASSES_AT)
    if not guest.pages:
        return Counters(begun, 0)
    counters = check_counters(memory, guest.start, guest.pages)
    # It counts a pass before it writes its first page, so with cursor 0 both values occur.
    if begun != counters.passes + 1 and (begun != counters.passes or counters.cursor):
        raise CounterError(f"the guest is in pass {begun}, its pages say {counters}")
    return counters


def heartbeats_in(serial: bytes) -> list[int]:
    """The numbers that the guest printed, in order; a last line without its end does not count.

    Raises:
        CounterError: when there is a line that the guest cannot have printed.
    """
    numbers = []
    for line in serial.split(b"\n")[:-1]:
        match = _HEARTBEAT.match(line)
        if not match:
            raise CounterError(f"the guest printed {line!r}, which is no heartbeat")
        numbers.append(int(match[1], 16))
    return numbers
