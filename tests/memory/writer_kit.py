# SPDX-License-Identifier: Apache-2.0
"""A thread that writes guest memory without the GIL, and a check for lost writes (writer.c)."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import threading
import time
from array import array
from pathlib import Path

from rdma_mig import _pages
from rdma_mig.memory import DirtyBitmap

PAGE = 4096


class Control(ctypes.Structure):
    _fields_ = (
        ("stop", ctypes.c_int),
        ("pause", ctypes.c_int),
        ("paused", ctypes.c_int),
        ("writes", ctypes.c_uint64),
    )


def build(directory):
    """Compile writer.c; a building host has a compiler."""
    library = Path(directory, "writer.so")
    source = Path(__file__).with_name("writer.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.write_pages.argtypes = [ctypes.c_void_p, ctypes.c_uint64] + [ctypes.c_void_p] * 3
    loaded.flip_bytes.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    loaded.note_done.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    loaded.copy_and_check.argtypes = [ctypes.c_void_p, ctypes.c_uint64] + [ctypes.c_void_p] * 3
    loaded.copy_and_check.restype = ctypes.c_int64
    return loaded


def address(words):
    return _pages.address_of(memoryview(words).cast("B"))


@contextlib.contextmanager
def running(function, *arguments):
    """A thread that runs a function of writer.c; yields what controls it."""
    control = Control()
    thread = threading.Thread(target=function, args=(*arguments, ctypes.addressof(control)))
    thread.start()
    try:
        yield control
    finally:
        control.pause = 0
        control.stop = 1
        thread.join()


class LostWrite(AssertionError):
    """The tracker lost a write."""


class Race:
    """A writer of one block at full speed, against a tracker.

    Args:
        kit: what `build` has returned.
        guest: the block.
        marks: the tracker's bitmap, for explicit marks.
    """

    def __init__(self, kit, guest, marks=None):
        self.kit = kit
        self.guest = guest
        self.pages = guest.block.length // PAGE
        self.marks = marks
        self.control = None
        self.done, self.before, self.copy = (array("Q", bytes(8 * self.pages)) for _ in range(3))
        self.exchanges = self.found = 0

    @contextlib.contextmanager
    def stopped(self):
        """Stop the writer, and resume it."""
        self.control.pause = 1
        # A writer that has ended is as good as one that is stopped.
        while not (self.control.paused or self.control.stop):
            time.sleep(0)
        try:
            yield
        finally:
            self.control.pause = 0
            while self.control.paused and not self.control.stop:
                time.sleep(0)

    def suited(self, tracker):
        """Stop the writer, if the tracker needs that."""
        return contextlib.nullcontext() if tracker.atomic else self.stopped()

    def run(self, tracker, exchanges, found, seconds=600.0):
        """Exchange while the writer runs, and check after each.

        Ends with both the exchanges and the pages found: how many exchanges see a write is the
        scheduler's choice, and an exchange that sees none proves nothing.

        Raises:
            LostWrite: a page was not found that had been written.
        """
        marks = None if self.marks is None else address(self.marks)
        ram = self.guest.memory.address
        work = (self.kit.write_pages, ram, self.pages, marks, address(self.done))
        end = time.monotonic() + seconds
        with running(*work) as self.control:
            with self.suited(tracker):
                tracker.start()
            self.exchange(tracker, everything=True)
            while self.exchanges < exchanges or self.found < found:
                self.exchange(tracker)
                if not self.exchanges % 1000 and time.monotonic() > end:
                    raise AssertionError(
                        f"only {self.exchanges} exchanges and {self.found} pages in {seconds} s"
                    )
            self.control.stop = 1
        self.exchange(tracker)
        if self.copy != self.done:
            raise LostWrite("a page differs at the end")

    def exchange(self, tracker, everything=False):
        dirty = DirtyBitmap(self.pages)
        self.kit.note_done(address(self.done), address(self.before), self.pages)
        with self.suited(tracker):
            self.found += tracker.harvest(self.guest.index, dirty)
        if everything:
            dirty.fill()
        lost = self.kit.copy_and_check(
            self.guest.memory.address,
            self.pages,
            address(dirty.words),
            address(self.copy),
            address(self.before),
        )
        if lost >= 0:
            raise LostWrite(
                f"exchange {self.exchanges}: page {lost} had seen write {self.before[lost]}, "
                f"{self.copy[lost]} was found"
            )
        self.exchanges += 1
