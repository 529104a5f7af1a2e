# SPDX-License-Identifier: Apache-2.0
"""RAM blocks on disk: files made, space set aside, data written and hashed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import time
from collections.abc import Callable, Generator
from enum import Enum, auto
from typing import Final, NamedTuple

import xxhash

from rdma_mig import _pages
from rdma_mig.errors import MigrationCancelled
from rdma_mig.memory import (
    CHUNK_SIZE,
    TARGET_PAGE_SIZE,
    GuestMemory,
    RamBlock,
    chunk_count,
    chunk_of,
    chunk_range,
)
from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.manifest import BlockRecord, digest_file, ram_file
from rdma_mig.words import printable

__all__ = [
    "DIGEST_SIZE",
    "WINDOW",
    "Look",
    "Progress",
    "Room",
    "Stop",
    "clear_block",
    "create_block",
    "data_bytes",
    "digest_size",
    "reserve_block",
    "write_block",
]

DIGEST_SIZE: Final = 16
"""Bytes of a chunk's digest (xxh3-128, big-endian)."""

WINDOW: Final = 4096
"""Chunks whose digests are read or written at once: 64 KiB of them for 4 GiB of RAM."""

_WRITEBACK: Final = 64 << 20
# Pages that are touched to see how long that takes, and how many seconds for one are slow.
_PROBED: Final = 32
_SLOW_FAULT: Final = 10e-6
# Bytes that space is set aside for at one go: it can be cancelled in between.
_RESERVED: Final = 64 << 20
# Pages of a chunk that are looked at first.
_GLANCES: Final = 4
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REOPEN: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC

Stop = Callable[[], bool] | None
Progress = Callable[[int], None] | None


class Look(Enum):
    """How closely memory is looked at before disk space is set aside for it."""

    NONE = auto()
    """Space for all that has pages, zero or not: no page is touched."""
    GLANCE = auto()
    """Where looking takes long, space for all of a chunk of which a few pages are not all zero."""
    EVERY_PAGE = auto()
    """Space for pages that are not zero, and no others."""


class Room(NamedTuple):
    """Space that was set aside for RAM.

    Attributes:
        size: bytes.
        exact: it is for pages that are not zero, and for no others.
        whole: it is for all chunks that have pages.
    """

    size: int
    exact: bool
    whole: bool = False


def digest_size(block: RamBlock) -> int:
    """Bytes of a block's digest file."""
    return DIGEST_SIZE * chunk_count(block.length)


def create_block(ram: int, index: int, block: RamBlock) -> None:
    """Create a block's files in the directory ``ram``, of their final length, all holes."""
    for name, size in ((ram_file(index), block.length), (digest_file(index), digest_size(block))):
        with _fs.closing(os.open(name, _CREATE, 0o600, dir_fd=ram)) as fd:
            os.ftruncate(fd, size)


def reserve_block(
    ram: int,
    index: int,
    block: RamBlock,
    memory: GuestMemory,
    stop: Stop,
    *,
    look: Look,
) -> Room:
    """Set disk space aside for a block's pages that are not zero, and for its digests.

    Where not every page is looked at there is some for others too; `write_block` gives back what it
    does not use.

    OSError is the file system's; nothing is undone.
    """
    if block.length > memory.length:
        raise ValueError(f"RAM block {block.idstr!r} is longer than its memory")
    total = 0
    exact = True
    with _fs.closing(os.open(digest_file(index), _REOPEN, dir_fd=ram)) as fd:
        _fs.set_aside(fd, digest_size(block))
    with _fs.closing(os.open(ram_file(index), _REOPEN, dir_fd=ram)) as fd:
        # Start and end of chunks in a row that get space for all of them, at one go.
        begin = end = 0

        def reserve_run() -> None:
            if end > begin:
                _fs.checked(_pages.reserve_space(fd, begin, end - begin))

        def whole(start: int, size: int) -> bool:
            nonlocal total, exact, begin, end
            _check(stop, "setting disk space aside for", block)
            if not _data_at_a_glance(memory, start, size):
                return False
            if start != end or start - begin >= _RESERVED:
                reserve_run()
                begin = start
            end = start + size
            total += size
            exact = False
            return True

        if look is Look.NONE:
            for first, last in memory.data_extents(block.length, CHUNK_SIZE):
                for start in range(first, last, _RESERVED):
                    _check(stop, "setting disk space aside for", block)
                    size = min(_RESERVED, last - start)
                    total += size
                    _fs.checked(_pages.reserve_space(fd, start, size))
            return Room(total, exact=False, whole=True)
        done = whole if look is Look.GLANCE else None
        with contextlib.closing(_chunks_with_data(block, memory, done)) as chunks:
            for _, start, part in chunks:
                _check(stop, "setting disk space aside for", block)
                total += _fs.checked(_pages.allocate_data(fd, part, start, TARGET_PAGE_SIZE))
        reserve_run()
    return Room(total, exact)


def clear_block(ram: int, index: int, block: RamBlock) -> None:
    """Give back what `reserve_block` set aside."""
    for name, size in ((ram_file(index), block.length), (digest_file(index), digest_size(block))):
        with _fs.closing(os.open(name, _REOPEN, dir_fd=ram)) as fd:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)


def data_bytes(block: RamBlock, memory: GuestMemory, stop: Stop) -> int:
    """Bytes in pages that are not zero."""
    total = 0
    with contextlib.closing(_chunks_with_data(block, memory)) as chunks:
        for _, _, part in chunks:
            _check(stop, "looking for data in", block)
            total += _pages.data_bytes(part, TARGET_PAGE_SIZE)
    return total


def write_block(
    ram: int,
    index: int,
    block: RamBlock,
    memory: GuestMemory,
    *,
    stop: Stop,
    progress: Progress,
    room: Room,
) -> BlockRecord:
    """Write a block's pages that are not zero with the digests of its chunks, and fsync both.

    Space that was set aside for others is given back. ``progress`` is told of bytes of the room
    that are done with, in no more than a MiB each time.
    """
    trim = not room.exact
    written = flushed = 0
    with (
        _fs.closing(os.open(ram_file(index), _REOPEN, dir_fd=ram)) as fd,
        _fs.closing(os.open(digest_file(index), _REOPEN, dir_fd=ram)) as digest_fd,
        contextlib.closing(_chunks_with_data(block, memory)) as chunks,
    ):
        digests = _DigestList(digest_fd)
        for chunk, start, part in chunks:
            _check(stop, "writing to disk", block)
            size = _fs.checked(_pages.write_data(fd, part, start, TARGET_PAGE_SIZE))
            if trim and size < len(part):
                # Where it cannot be given back, it stays so.
                _pages.punch_zeros(fd, part, start, TARGET_PAGE_SIZE)
            if progress is not None and (size or room.whole):
                progress(len(part) if room.whole else size)
            if not size:
                continue
            digests.put(chunk, xxhash.xxh3_128_digest(part))
            written += size
            if start - flushed >= _WRITEBACK:
                # So that the disk works while we do, and the fsync has little left to wait for.
                _pages.start_writeback(fd, flushed, start - flushed)
                flushed = start
        total = digests.finish(chunk_count(block.length))
        os.fsync(fd)
        os.fsync(digest_fd)
    return BlockRecord(block, written, total)


class _DigestList:
    """Digests by chunk number, ascending; those left out are zero. Written a window at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._whole = hashlib.sha256()
        self._window = bytearray()
        self._first = 0  # the chunk that the window begins with

    def put(self, chunk: int, digest: bytes) -> None:
        self._zeros_up_to(chunk)
        self._window += digest

    def finish(self, chunks: int) -> str:
        self._zeros_up_to(chunks)
        self._flush()
        return self._whole.hexdigest()

    def _zeros_up_to(self, chunk: int) -> None:
        while chunk >= self._first + WINDOW:
            self._window += bytes(DIGEST_SIZE * WINDOW - len(self._window))
            self._flush()
        self._window += bytes(DIGEST_SIZE * (chunk - self._first) - len(self._window))

    def _flush(self) -> None:
        self._whole.update(self._window)
        if not _pages.is_zero(self._window):
            _fs.write_all(self._fd, self._window, DIGEST_SIZE * self._first)
        self._first += len(self._window) // DIGEST_SIZE
        self._window.clear()


def _chunks_with_data(
    block: RamBlock, memory: GuestMemory, done: Callable[[int, int], bool] | None = None
) -> Generator[tuple[int, int, memoryview], None, None]:
    """Chunks that have pages at all: number, offset, bytes. Holes of the memory stay holes.

    The bytes are those of the mapping or, where touching that is slow, a copy of them that is good
    up to the next chunk; before one is made ``done`` is asked, with offset and size, whether the
    chunk is to be left out. To be closed when it is left early: it keeps a view of the memory.
    """
    copies: memoryview | None = None
    with memory.view() as view:
        at = memory.next_data(0)
        while at is not None and at < block.length:
            chunk = chunk_of(at)
            start, size = chunk_range(chunk, block.length)
            with view[start : start + size] as part:
                if copies is None and _faults_are_slow(part):
                    copies = memoryview(bytearray(CHUNK_SIZE))
                if copies is None:
                    yield chunk, start, part
                elif done is None or not done(start, size):
                    with copies[:size] as copy:
                        _read_whole(memory.fd, copy, start)
                        yield chunk, start, copy
            at = memory.next_data(start + size)


def _faults_are_slow(part: memoryview) -> bool:
    """Whether reading memory that the peer has written costs a slow page fault each page.

    It does in emulated machines, where 1 GiB then takes 10 s and more, and a copy of it by the
    kernel a second. Elsewhere the pages are mapped since they were registered.
    """
    with part[: _PROBED * mmap.PAGESIZE] as probed:
        began = time.thread_time()
        _pages.read_touch(probed, mmap.PAGESIZE)
        return time.thread_time() - began > _PROBED * _SLOW_FAULT


def _data_at_a_glance(memory: GuestMemory, start: int, size: int) -> bool:
    """Whether one of a few pages of a chunk is not zero."""
    page = bytearray(mmap.PAGESIZE)
    for offset in range(start, start + size, max(size // _GLANCES, 1)):
        count = os.preadv(memory.fd, [page], offset)
        if not _pages.is_zero(memoryview(page)[:count]):
            return True
    return False


def _read_whole(fd: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        with into[done:] as rest:
            if not (count := os.preadv(fd, [rest], offset + done)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += count


def _check(stop: Stop, doing: str, block: RamBlock) -> None:
    if stop is not None and stop():
        raise MigrationCancelled(f"{doing} RAM block {printable(block.idstr)} was cancelled")
