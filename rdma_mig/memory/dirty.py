# SPDX-License-Identifier: Apache-2.0
"""Which pages of a live guest are written: by explicit marks, or from what the kernel knows.

What a tracker must never do is to lose a write: a page that is written after it was reported is
reported again. docs/dirty-tracking.md says which kernel has what, and what none of them sees.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from rdma_mig import _dirty
from rdma_mig.closing import Closing
from rdma_mig.errors import HostError
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE, RamBlock
from rdma_mig.memory.ram import GuestRam

__all__ = [
    "Choice",
    "DirtyTracker",
    "ExplicitMarks",
    "PagemapScan",
    "SoftDirty",
    "UffdWriteProtect",
    "choose_tracker",
    "kernel_trackers",
]

_PAGEMAP = "/proc/self/pagemap"


class DirtyTracker(Protocol):
    """Tells which pages of a guest's RAM were written.

    The order is what matters: `harvest`, then read the pages that it found. A write that comes
    after the harvest is found by the next one, whether or not the page was read with it.

    One that is not ``atomic`` needs writers that are stopped, by whoever calls it, during ``start``
    and while all blocks are harvested, one after the other.
    """

    @property
    def atomic(self) -> bool:
        """Whether the guest may write during `start` and `harvest`."""
        ...

    def start(self) -> None:
        """Begin: what is written from here on is found. All pages are to be sent after this.

        Raises:
            HostError: this host cannot.
        """
        ...

    def harvest(self, index: int, into: DirtyBitmap) -> int:
        """Find what was written in one block since the last time, and forget it.

        Args:
            index: of the block, in stream order.
            into: its bitmap, which is added to.

        Returns:
            How many pages were found.

        Raises:
            HostError: this host could not; what was written meanwhile is unknown.
        """
        ...

    def stop(self) -> None:
        """Track no more, and let writes go on as if nothing had been. Idempotent."""
        ...


def _bitmap(length: int) -> array[int]:
    return array("Q", bytes(8 * -(-length // (64 * TARGET_PAGE_SIZE))))


class ExplicitMarks:
    """Marks that the owner of the memory sets, after each write.

    After, not before: a mark that is set before may be taken, and the page read, before the write.
    Nothing else is needed of the kernel or of who writes: a device, another process, any mapping.

    Args:
        ram: the guest's.
        words: for each block the words of a bitmap that the owner sets bits of itself, such as
            memory shared with another process: bit 0 of word 0 is the first page of 4096 bytes; a
            bit is set by an atomic OR behind the write. None: only by `mark`.
    """

    atomic = True

    def __init__(self, ram: GuestRam, words: Sequence[memoryview] | None = None) -> None:
        own = [memoryview(_bitmap(guest.block.length)) for guest in ram]
        self._words = own if words is None else list(words)
        if [len(given) for given in self._words] != [len(wanted) for wanted in own]:
            raise ValueError(
                f"bitmaps of {[len(given) for given in self._words]} words for blocks that need "
                f"{[len(wanted) for wanted in own]}"
            )
        self._pages = [-(-guest.block.length // TARGET_PAGE_SIZE) for guest in ram]

    def mark(self, index: int, first: int, count: int = 1) -> None:
        """Say that pages were written. From any thread, at any time.

        Args:
            index: of their block.
            first: number of the first page.
            count: how many.

        Raises:
            IndexError: there are no such pages.
        """
        if first < 0 or count < 0 or first + count > self._pages[index]:
            raise IndexError(f"{count} pages from {first} of {self._pages[index]}")
        _dirty.mark(self._words[index], first, count)

    def start(self) -> None:
        """Forget the marks so far."""
        for words in self._words:
            _dirty.take(words, array("Q", bytes(8 * len(words))))

    def harvest(self, index: int, into: DirtyBitmap) -> int:
        """Exchange the marks of a block for none, word by word, and add them to ``into``."""
        return _dirty.take(self._words[index], into.words)

    def stop(self) -> None:
        """Do nothing: marks go on being taken."""


class _KernelTracker(Closing):
    """Base of those that ask the kernel: it sees what this process writes through its mapping.

    Nothing else: no write of another process or of a device, nor write(2) into the memory's file.

    Args:
        ram: the guest's, which cannot be closed until `stop`.
    """

    atomic = True

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._held: ExitStack | None = None

    @classmethod
    def unsupported(cls) -> str:
        """Why this host cannot, empty when it can: found by tracking a page of its own."""
        try:
            with GuestRam([RamBlock("probe", mmap.PAGESIZE)]) as ram, cls(ram) as tracker:
                bitmap = DirtyBitmap.of_length(mmap.PAGESIZE)
                tracker.start()
                found = [tracker.harvest(0, bitmap)]
                for byte in (1, 2):
                    with ram[0].memory.view() as view:
                        view[0] = byte
                    found += [tracker.harvest(0, bitmap), tracker.harvest(0, bitmap)]
        except HostError as error:
            return error.message
        per_page = mmap.PAGESIZE // TARGET_PAGE_SIZE
        if found != [0, per_page, 0, per_page, 0]:
            return "this kernel does not tell which pages were written"
        return ""

    def start(self) -> None:
        """Begin; see `DirtyTracker`."""
        if self._held is not None:
            raise ValueError("the tracker was started already")
        with ExitStack() as stack:
            for guest in self._ram:
                stack.enter_context(guest.memory.hold("a dirty tracker"))
            self._begin(stack)
            self._held = stack.pop_all()

    @abstractmethod
    def _begin(self, stack: ExitStack) -> None:
        """Take what is needed; ``stack`` gives it back, at `stop` or now if this fails."""

    def harvest(self, index: int, into: DirtyBitmap) -> int:
        """Find what was written in one block since the last time; see `DirtyTracker`."""
        if self._held is None:
            raise ValueError("the tracker was not started")
        return self._find(index, into)

    @abstractmethod
    def _find(self, index: int, into: DirtyBitmap) -> int: ...

    def stop(self) -> None:
        """Track no more. Idempotent."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def close(self) -> None:
        """As `stop`."""
        self.stop()

    def _pagemap(self, stack: ExitStack) -> int:
        try:
            fd = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"{_PAGEMAP} cannot be read: {error.strerror}") from error
        stack.callback(os.close, fd)
        return fd

    def _protect_all(self, stack: ExitStack, features: int, *, user_mode_suffices: bool) -> int:
        """Open a userfaultfd and protect all RAM; return the descriptor."""
        fd = _dirty.uffd_open(features, user_mode_suffices)
        if fd < 0:
            raise HostError(*_NO_UFFD.get(-fd, (f"userfaultfd: {os.strerror(-fd)}",)))
        # Closed last: closing it lets all writes through as well.
        stack.callback(os.close, fd)
        for guest in self._ram:
            address, length = guest.memory.address, guest.memory.length
            _checked(_dirty.uffd_register(fd, address, length), "userfaultfd cannot watch RAM")
            stack.callback(_dirty.uffd_unregister, fd, address, length)
        return fd

    def _protect(self, fd: int) -> None:
        for guest in self._ram:
            failed = _dirty.uffd_protect(fd, guest.memory.address, guest.memory.length)
            _checked(failed, "userfaultfd cannot protect RAM")


_NO_UFFD = {
    errno.EINVAL: ("the kernel's userfaultfd lacks this kind of write-protection",),
    errno.ENOSYS: ("the kernel has no userfaultfd",),
    errno.EPERM: (
        "userfaultfd is not allowed to this user: set vm.unprivileged_userfaultfd=1, or allow "
        "reading and writing of /dev/userfaultfd",
    ),
}


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise HostError(f"{what}: {os.strerror(-result)}")
    return result


class PagemapScan(_KernelTracker):
    """Linux 6.7 and later: PAGEMAP_SCAN over memory under asynchronous write-protection.

    A write to a protected page lets itself through in the kernel, at the cost of a minor fault;
    finding written pages and protecting them again is one step of the kernel for each page.
    """

    _fd = -1

    def _begin(self, stack: ExitStack) -> None:
        features = _dirty.FEATURE_WP_ASYNC | _dirty.FEATURE_WP_SHMEM
        # The kernel's own writes resolve themselves too, so nobody has to hear of them.
        uffd = self._protect_all(stack, features, user_mode_suffices=True)
        self._fd = self._pagemap(stack)
        self._protect(uffd)

    def _find(self, index: int, into: DirtyBitmap) -> int:
        memory = self._ram[index].memory
        pages = memory.length // TARGET_PAGE_SIZE
        found = _dirty.scan_written(self._fd, memory.address, into.words, pages, TARGET_PAGE_SIZE)
        return _checked(found, "PAGEMAP_SCAN failed")


class UffdWriteProtect(_KernelTracker):
    """Linux 5.19 and later: a thread of ours marks a page when it is first written.

    The writer waits for that, some microseconds for each page. The thread needs no GIL: a writer
    that holds it while it waits does not block it.
    """

    _faults: _dirty.WriteFaults | None = None

    def _begin(self, stack: ExitStack) -> None:
        # Had it not to hear of the kernel's own writes, read(2) into RAM would fail with EFAULT.
        fd = self._protect_all(stack, _dirty.FEATURE_WP_SHMEM, user_mode_suffices=False)
        wake = os.eventfd(0, os.EFD_CLOEXEC)
        stack.callback(os.close, wake)
        faults = _dirty.WriteFaults(
            fd,
            [
                (guest.memory.address, guest.memory.length, _bitmap(guest.memory.length))
                for guest in self._ram
            ],
            TARGET_PAGE_SIZE,
        )
        # A daemon: should nobody stop us, the process can end all the same.
        thread = threading.Thread(
            target=faults.serve, args=(wake,), name="write-faults", daemon=True
        )
        thread.start()
        stack.callback(thread.join)
        while not faults.serving:
            time.sleep(0)
        stack.callback(os.eventfd_write, wake, 1)
        # Let all writes through before the thread ends: it needs the GIL for that, and a writer
        # that waits may hold it.
        for guest in self._ram:
            stack.callback(_dirty.uffd_unregister, fd, guest.memory.address, guest.memory.length)
        self._faults = faults
        self._protect(fd)

    def _find(self, index: int, into: DirtyBitmap) -> int:
        assert self._faults is not None
        found = self._faults.take(index, into.words)
        return _checked(found, "userfaultfd cannot track what is written any more")


class SoftDirty(_KernelTracker):
    """Linux with soft-dirty bits (CONFIG_MEM_SOFT_DIRTY): only while writers are stopped.

    Reading the bits and clearing them are two steps: a write in between would be lost. So whoever
    harvests stops the writers for as long as it takes to read and clear the bits of all RAM. They
    are the whole process's: nobody else may clear them. A page that the kernel takes out of the
    mapping loses its bit, so RAM is locked while it is tracked, and kept from becoming huge pages.

    Args:
        ram: the guest's.
    """

    atomic = False
    _fd = -1

    def __init__(self, ram: GuestRam) -> None:
        super().__init__(ram)
        self._pending: list[DirtyBitmap] = []

    def _begin(self, stack: ExitStack) -> None:
        self._fd = self._pagemap(stack)
        for guest in self._ram:
            memory = guest.memory
            failed = _dirty.pin_mapping(memory.address, memory.length)
            _checked(failed, f"RAM block {guest.block.idstr!r} cannot be locked in memory")
            stack.callback(_dirty.unpin_mapping, memory.address, memory.length)
        self._pending = [DirtyBitmap.of_length(guest.memory.length) for guest in self._ram]
        self._clear()

    def _clear(self) -> None:
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("4")
        except OSError as error:
            raise HostError(f"the kernel has no soft-dirty bits: {error.strerror}") from error

    def _find(self, index: int, into: DirtyBitmap) -> int:
        for guest, pending in zip(self._ram, self._pending, strict=True):
            memory = guest.memory
            pages = memory.length // TARGET_PAGE_SIZE
            found = _dirty.read_soft_dirty(
                self._fd, memory.address, pending.words, pages, mmap.PAGESIZE
            )
            _checked(found, f"{_PAGEMAP} cannot be read")
        self._clear()
        return _dirty.take(self._pending[index].words, into.words)


@dataclass(frozen=True, slots=True)
class Choice:
    """A tracker, and why it is not a better one.

    Attributes:
        tracker: not started yet.
        refused: the name of each better tracker, and why this host does not have it.
    """

    tracker: DirtyTracker
    refused: dict[str, str]


def kernel_trackers() -> dict[str, str]:
    """Try what this kernel has, each on a page of its own; the best one comes first.

    Returns:
        the name of each tracker, and why this host does not have it: empty where it does.
    """
    kinds = (PagemapScan, UffdWriteProtect, SoftDirty)
    return {kind.__name__: kind.unsupported() for kind in kinds}


def choose_tracker(ram: GuestRam, *, can_stop: bool = False, registered: bool = False) -> Choice:
    """Take the best tracker that the kernel has; each is tried on a page of its own.

    Args:
        ram: the guest's.
        can_stop: whether the writers can be stopped again and again while the guest migrates,
            without which `SoftDirty` is no choice.
        registered: whether RAM is registered with an RDMA device while it is tracked, as a
            migration over RDMA does, which rules `UffdWriteProtect` out.

    Raises:
        HostError: there is none; says why.
    """
    refused: dict[str, str] = {}
    kinds: list[type[PagemapScan] | type[UffdWriteProtect]] = [PagemapScan, UffdWriteProtect]
    for kind in kinds:
        reason = kind.unsupported()
        if registered and kind is UffdWriteProtect and not reason:
            # The kernel does not wait for our thread there: ibv_reg_mr says EFAULT.
            reason = "memory that it protects cannot be registered with an RDMA device"
        if not reason:
            return Choice(kind(ram), refused)
        refused[kind.__name__] = reason
    if not can_stop:
        refused[SoftDirty.__name__] = "the writers cannot be stopped"
    elif not (reason := SoftDirty.unsupported()):
        return Choice(SoftDirty(ram), refused)
    else:
        refused[SoftDirty.__name__] = reason
    raise HostError(
        "this kernel cannot tell which pages are written ("
        + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        + ")",
        remedy="mark what is written explicitly, or use Linux 5.19 or later (6.7 for the best)",
    )
