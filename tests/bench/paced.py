# SPDX-License-Identifier: Apache-2.0
"""Two guests that dirty memory alike: one of a QEMU, and one of this package's own engine.

Both write the number of a pass at the start of page after page, in bursts that come at a pace.
"""

from __future__ import annotations

import ctypes
import random
import struct
import subprocess
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import PAGE_SIZE, Guest, Qemu
from harness.guest import PARAMETERS_AT, assembled

from rdma_mig import _pages
from rdma_mig.memory import RamBlock
from rdma_mig.memory.dirty import ExplicitMarks
from rdma_mig.migration.guests import ProcessGuest

MIB = 1 << 20
#: Pages of a burst: some ten bursts in each 4 ms that a guest sleeps, at a gigabyte a second.
BURST = 64
#: Seconds that a guest may be behind its pace and still catches up.
SLACK = 0.1
#: Where the pages that are dirtied begin in RAM, as far as a guest of a QEMU can write.
START = 16 * MIB

_HERE = Path(__file__).resolve().parent
_PARAMETERS = struct.Struct("<4sIIIII")  # magic, start, end, burst, slack, interval
_MAGIC = b"RMP1"
_SEEN_AT = 0x9008
_SEEN = struct.Struct("<QQ")  # cycles, pages
_INTERVAL_AT = 0x9020
# Before its clock is known: any processor's cycles come to a pace that it can keep with this.
_FIRST_CYCLES = 2e9
_MOST = (1 << 32) - 1
_MACHINE = "paced-1.0"


def interval_of(pace: float, ticks: float) -> int:
    """Return the ticks between two bursts, of a clock with so many ticks a second.

    Args:
        pace: bytes a second.
        ticks: of the clock, a second.
    """
    return min(max(round(BURST * PAGE_SIZE / pace * ticks), 1), _MOST)


def noise(ram: int) -> Iterator[tuple[int, bytes]]:
    """Return what fills the memory of both guests: where, and a MiB of noise, each another one.

    The first MiB, which the guest of a QEMU runs in, are left out, and the last one, which its
    firmware uses.
    """
    whole = random.Random(1).randbytes(MIB)
    for start in range(START, ram - MIB, MIB):
        turned = start // MIB
        yield start, whole[turned:] + whole[:turned]


@dataclass(frozen=True)
class PacedGuest(Guest):
    """The guest of paced.S: ``pages`` pages from ``start`` on; its pause is not used.

    Args:
        interval: cycles between two bursts, at first.
        slack: cycles that it may be behind.
    """

    interval: int = 0
    slack: int = 0

    @classmethod
    def dirtying_at(cls, size: int, pace: float, cycles: float = _FIRST_CYCLES) -> PacedGuest:
        """A guest that dirties so many bytes at so many bytes a second.

        ``cycles`` are those of its time stamp counter in a second.
        """
        pages = size // PAGE_SIZE
        if pages % BURST:
            raise ValueError(f"{pages} pages are no multiple of {BURST}")
        return cls(
            start=START, pages=pages, interval=interval_of(pace, cycles),
            slack=min(int(SLACK * cycles), _MOST),
        )  # fmt: skip

    def image(self) -> bytes:
        """The boot sector with these parameters in it: 512 bytes."""
        sector = bytearray(assembled(_HERE / "paced.S", _MAGIC))
        _PARAMETERS.pack_into(
            sector, PARAMETERS_AT, _MAGIC, self.start, self.end, BURST, self.slack, self.interval
        )
        return bytes(sector)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a paced guest had done at a moment: seconds, cycles of its clock, pages written."""

    at: float
    cycles: int
    pages: int

    @classmethod
    def of(cls, qemu: Qemu) -> Seen:
        """Look into the memory of a QEMU's guest."""
        with qemu.memory_path.open("rb") as memory:
            memory.seek(_SEEN_AT)
            raw = memory.read(_SEEN.size)
        return cls(time.monotonic(), *_SEEN.unpack(raw))

    def cycles_a_second(self, before: Seen) -> float:
        """How fast its clock went since then."""
        return (self.cycles - before.cycles) / (self.at - before.at)

    def pace(self, before: Seen) -> float:
        """Bytes a second that it dirtied since then."""
        return (self.pages - before.pages) * PAGE_SIZE / (self.at - before.at)


def set_pace(qemu: Qemu, pace: float, cycles: float) -> None:
    """Give the guest of a QEMU another pace, while it runs: bytes a second."""
    with qemu.memory_path.open("r+b") as memory:
        memory.seek(_INTERVAL_AT)
        memory.write(interval_of(pace, cycles).to_bytes(4, "little"))


class _Written(ctypes.Structure):
    """What paced.c tells: pages, and CLOCK_MONOTONIC when it began to write and when it was held.

    Both times are nanoseconds.
    """

    _fields_ = (
        ("written", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
    )


def build(directory: Path) -> ctypes.CDLL:
    """Compile paced.c; whoever builds this package has a compiler."""
    library = directory / "paced.so"
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", library, _HERE / "paced.c"],
        check=True, timeout=60,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.run.argtypes = [ctypes.c_void_p, *[ctypes.c_uint64] * 4, ctypes.c_void_p]
    loaded.look.argtypes = [ctypes.c_void_p]
    loaded.place.argtypes = [ctypes.c_uint64]
    return loaded


class PacedProcess(ProcessGuest):
    """Memory of this process that the thread of paced.c dirties, with explicit marks.

    Args:
        ram: bytes of memory.
        size: how many of them are dirtied, over and over.
        pace: bytes a second.
        directory: where the thread's code is compiled to.
    """

    def __init__(self, ram: int, size: int, pace: float, directory: Path) -> None:
        super().__init__(_MACHINE, (RamBlock("pc.ram", ram),))
        self._native = build(directory)
        self.pages = size // PAGE_SIZE
        block = self.ram[0].block
        self.marks = array("Q", bytes(8 * -(-block.length // (64 * PAGE_SIZE))))
        self.tracker = ExplicitMarks(self.ram, [memoryview(self.marks)])
        words = _pages.address_of(memoryview(self.marks).cast("B"))
        first = START // PAGE_SIZE
        self._thread = threading.Thread(
            target=self._native.run,
            args=(
                self.ram[0].memory.address + START, self.pages, BURST, interval_of(pace, 1e9),
                int(SLACK * 1e9), words + first // 8,
            ),
            name="paced",
        )  # fmt: skip
        self._thread.start()

    def stop(self) -> None:
        """Let it write no more; when this returns it does not."""
        self._native.hold()

    def resume(self) -> None:
        """Let it write."""
        self._native.let()

    def save_state(self) -> bytes:
        """Return where it is."""
        return self.seen().written.to_bytes(8, "big")

    def load_state(self, state: bytes) -> None:
        """Go on where it was."""
        self._native.place(int.from_bytes(state, "big"))

    def seen(self) -> _Written:
        """What it has done up to now."""
        into = _Written()
        self._native.look(ctypes.addressof(into))
        return into

    def close(self) -> None:
        """End the thread, and give the memory back."""
        self._native.finish()
        self._thread.join()
        super().close()
