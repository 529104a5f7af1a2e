# SPDX-License-Identifier: Apache-2.0
"""The bytes of a guest: an unnamed file in memory, mapped once, safe to pin.

A memfd and not a file on disk, since Linux 6.4 refuses to pin file-backed pages for writing other
than those of shmem and hugetlbfs. Sealed against resizing, so that nobody who gets hold of the
descriptor can pull the pages from under a memory region or a copy loop.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

from rdma_mig import _pages
from rdma_mig.closing import Closing
from rdma_mig.errors import HostError, MigrationCancelled
from rdma_mig.memory.meminfo import free_huge_pages, huge_page_size, meminfo

__all__ = ["GuestMemory", "MemoryHold"]

_MFD_HUGETLB = 0x4  # as os.MFD_HUGETLB, which Python has only where its C library had it
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3; vm.memfd_noexec=2 refuses every memfd without it
_MIB = 1 << 20
# Populated at a time, between two looks at whether it shall go on.
_STEP = 64 * _MIB
_NAME_LIMIT = 200  # the kernel takes 249 bytes; the name is for /proc/PID/maps only


def _human(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{-(-size // _MIB)} MiB"


class MemoryHold:
    """What keeps a `GuestMemory` from being closed: a memory region over it, a copy under way."""

    def __init__(self, memory: GuestMemory, what: str) -> None:
        self.what = what
        self._memory: GuestMemory | None = memory

    def release(self) -> None:
        """Let go; a second time does nothing."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory._holds.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class GuestMemory(Closing):
    """Memory of one RAM block, all zeros at first; no page is allocated until it is touched.

    A context manager; closing is refused while anything holds it.

    Args:
        length: bytes.
        name: what it is, for messages and /proc/PID/maps (the block's idstr).
        huge_pages: take the huge pages that were set aside (hugetlbfs, vm.nr_hugepages), where
            ``length`` is a multiple of their size. They are allotted here and now, all of them, and
            what is touched is populated in a fraction of the time.

    Attributes:
        length: bytes.
        huge: whether it is in huge pages.
        address: where it is mapped in this process, at a page.
        fd: the memfd, open for as long as the memory is; not to be closed by others.

    Raises:
        HostError: this host cannot provide it (memory, address space, descriptors, file size,
            huge pages).
    """

    def __init__(self, length: int, name: str, *, huge_pages: bool = False) -> None:
        if length <= 0:
            raise ValueError(f"guest memory {name!r} of {length} bytes")
        size = huge_page_size() if huge_pages else 0
        if huge_pages and not size:
            raise HostError(
                "this kernel has no huge pages", remedy="leave --huge-pages out: it does without"
            )
        self._set_up(length, name, -1, huge=bool(size) and length % size == 0)

    @classmethod
    def adopt(cls, fd: int, name: str) -> GuestMemory:
        """Map the memory of another process.

        Args:
            fd: what its `fd` was sent as; closed with this, also when it fails.
            name: as above.

        Raises:
            HostError: it cannot be mapped.
        """
        memory = cls.__new__(cls)
        memory._set_up(os.fstat(fd).st_size, name, fd)
        return memory

    def _set_up(self, length: int, name: str, fd: int, *, huge: bool = False) -> None:
        self.name = name
        self.length = length
        self.huge = huge
        self.fd = fd
        self._holds: list[MemoryHold] = []
        self._map: mmap.mmap | None = None
        try:
            if fd < 0:
                self.fd = _memfd(name, _MFD_HUGETLB if huge else 0)
                os.ftruncate(self.fd, length)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
            self._map = mmap.mmap(self.fd, length, mmap.MAP_SHARED)
            # A core dump would hold the guest's secrets, and take as long as the guest is large.
            self._map.madvise(mmap.MADV_DONTDUMP)
            self.address = _pages.address_of(self._map)
        except (OSError, OverflowError) as error:
            self._discard()
            raise self._refused("cannot be had", error) from error

    def _refused(self, what: str, error: OSError | OverflowError) -> HostError:
        code = error.errno if isinstance(error, OSError) else errno.ENOMEM
        if self.huge and code == errno.ENOMEM:
            return HostError(
                f"{_human(self.length)} of memory for RAM block {self.name!r} {what}: "
                "too few huge pages are set aside, "
                f"{free_huge_pages()} of {_human(huge_page_size())} are left",
                remedy="set more aside (sysctl vm.nr_hugepages), or leave --huge-pages out",
            )
        remedy = {
            errno.EFBIG: "raise the file size limit (ulimit -f), which counts for memory files too",
            errno.EMFILE: "raise the limit of open files (ulimit -n)",
            errno.ENFILE: "raise fs.file-max",
        }.get(
            code or 0,
            "free memory, add swap, or raise the limits on this process (cgroup memory.max, "
            "ulimit -v, vm.overcommit_memory)",
        )
        reason = os.strerror(code) if code else str(error)
        return HostError(
            f"{_human(self.length)} of memory for RAM block {self.name!r} {what}: {reason}",
            remedy=remedy,
        )

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"guest memory {self.name!r} is closed")
        return self._map

    @property
    def closed(self) -> bool:
        """Whether the memory was given back."""
        return self._map is None

    def view(self) -> memoryview:
        """All of it, writable; while the view (or a slice) lives, the memory cannot be closed."""
        return memoryview(self._mapped())

    def next_data(self, offset: int) -> int | None:
        """The offset at or after ``offset`` from which pages are allocated; None for no more.

        What lies between is zero, and reading it through the mapping would allocate it. Of memory
        in huge pages it is known only whether there is one at all.
        """
        self._mapped()
        if offset >= self.length or (self.huge and not os.fstat(self.fd).st_blocks):
            return None
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    def data_extents(self, length: int, unit: int) -> Iterator[tuple[int, int]]:
        """Yield start and end of what has pages, up to ``length``; the rest is zero.

        In whole units of so many bytes: pages here and there in one are no extents of their own.
        """
        start = end = 0
        while end < length and (at := self.next_data(end)) is not None:
            if (first := at // unit * unit) > end:
                if end > start:
                    yield start, end
                start = first
            hole = os.lseek(self.fd, at, os.SEEK_HOLE)
            end = min(-(-hole // unit) * unit, length)
        if end > start:
            yield start, end

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether these bytes are zero; what has no pages is not read."""
        at, end = offset, offset + length
        with self.view() as view:
            while (found := self.next_data(at)) is not None and found < end:
                at = min(os.lseek(self.fd, found, os.SEEK_HOLE), end)
                with view[found:at] as part:
                    if not _pages.is_zero(part):
                        return False
        return True

    def fill(self, offset: int, data: memoryview) -> None:
        """Write the pages of ``data`` that are not zero to memory that is zero there.

        Raises:
            HostError: there is not enough memory.
        """
        self._mapped()
        if self.huge:  # which no file is written to
            with self.view() as view:
                view[offset : offset + len(data)] = data
            return
        written = _pages.write_data(self.fd, data, offset, mmap.PAGESIZE)
        if written < 0:
            raise self._refused(
                f"cannot be allocated ({_human(offset)} of it could)",
                OSError(errno.ENOMEM if written == -errno.ENOSPC else -written, ""),
            )

    def populate(self, should_stop: Callable[[], bool] | None = None, step: int = _STEP) -> None:
        """Allocate and map every page now, without the GIL, so that registration is quick.

        Args:
            should_stop: asked before each step; true ends it with `MigrationCancelled`.
            step: bytes at a time, a multiple of the page size.

        Raises:
            HostError: there is not enough memory; what was allocated so far stays until close.
            MigrationCancelled: ``should_stop`` said so.
        """
        self._mapped()
        if step <= 0 or step % mmap.PAGESIZE:
            raise ValueError(f"step {step} is not a multiple of the page size")
        missing = self.length - os.fstat(self.fd).st_blocks * 512
        info = meminfo()
        left = info.get("MemAvailable", missing) + info.get("SwapFree", 0)
        if not self.huge and missing > left:
            # Populating beyond that wakes the OOM killer, which may choose anyone.
            raise HostError(
                f"RAM block {self.name!r} needs {_human(missing)} of memory and this host has "
                f"{_human(left)} left",
                remedy="free memory or add swap",
            )
        self._populate([(0, self.length)], should_stop, step)

    def map_data(self, unit: int, should_stop: Callable[[], bool] | None = None) -> None:
        """Map what has pages already, so that neither registering nor reading faults page by page.

        Args:
            unit: bytes; where one has a page, all of it is allocated.
            should_stop: as for populate().

        Raises: as populate().
        """
        self._mapped()
        self._populate(self.data_extents(self.length, unit), should_stop, _STEP)

    def _populate(
        self,
        extents: Iterable[tuple[int, int]],
        should_stop: Callable[[], bool] | None,
        step: int,
    ) -> None:
        with self.view() as view:
            for begin, end in extents:
                for start in range(begin, end, step):
                    if should_stop is not None and should_stop():
                        raise MigrationCancelled(
                            f"populating the memory of RAM block {self.name!r} was cancelled"
                        )
                    with view[start : min(start + step, end)] as part:
                        self._populate_part(start, part)

    def _populate_part(self, start: int, part: memoryview) -> None:
        try:
            for _ in range(100):
                failed = -_pages.populate_write(part)
                if failed not in (errno.EAGAIN, errno.EINTR):
                    break
            if failed == errno.EINVAL:
                # Before Linux 5.14. Allocation first: it fails with an errno, a touch with SIGBUS.
                os.posix_fallocate(self.fd, start, len(part))
                _pages.touch_write(part, mmap.PAGESIZE)
            elif failed:
                # EFAULT: a touch would have been a SIGBUS, for want of memory (or a broken page).
                raise OSError(errno.ENOMEM if failed == errno.EFAULT else failed, "")
        except OSError as error:
            raise self._refused(
                f"cannot be allocated ({_human(start)} of it could)", error
            ) from error

    def hold(self, what: str = "a user") -> MemoryHold:
        """Keep the memory from being closed until the result is released.

        Args:
            what: who holds it, for the message of a ``close`` that comes too early.
        """
        self._mapped()
        held = MemoryHold(self, what)
        self._holds.append(held)
        return held

    def close(self) -> None:
        """Give the memory back; a second time does nothing.

        Raises:
            BufferError: it is held, or a view of it lives; it stays as it was.
        """
        if self._map is None:
            return
        if self._holds:
            who = ", ".join(held.what for held in self._holds)
            raise BufferError(f"guest memory {self.name!r} is still held by {who}")
        try:
            self._map.close()
        except BufferError:
            raise BufferError(f"a view of guest memory {self.name!r} is still in use") from None
        self._discard()

    def _discard(self) -> None:
        self._map = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        state = "closed" if self._map is None else f"at {self.address:#x}"
        return f"<GuestMemory {self.name!r}, {self.length} bytes, {state}>"

    def __del__(self) -> None:
        if getattr(self, "_map", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)
            self._discard()


def _memfd(name: str, flags: int) -> int:
    label = name.encode("utf-8", "surrogateescape").replace(b"\0", b"?")[:_NAME_LIMIT]
    flags |= os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(os.fsdecode(label), flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(os.fsdecode(label), flags)
