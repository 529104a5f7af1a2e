# SPDX-License-Identifier: Apache-2.0
"""Pages in the migration stream: how they travel where no transport moves them beside it.

Wire: docs/protocol.md, pages in the stream.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from rdma_mig import _stream
from rdma_mig.errors import HostError, RemoteProtocolError
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.memory.ram import GuestBlock, GuestRam

__all__ = [
    "DEFAULT_CACHE_SIZE",
    "PIECE_SIZE",
    "PageCounters",
    "PageReader",
    "PageWriter",
    "Stage",
    "XbzrleCache",
]

PIECE_SIZE = 1 << 20
"""Most bytes that `PageWriter` encodes at a time."""

DEFAULT_CACHE_SIZE = 64 << 20
"""Bytes of pages in the XBZRLE cache where nothing else is said; as in QEMU 7.2."""


@dataclass(slots=True)
class PageCounters:
    """What `PageWriter` has encoded, or `PageReader` has loaded.

    Attributes:
        normal: pages as they are.
        duplicate: pages that are all zero, which were announced instead of sent.
        xbzrle_pages: pages of which only what had changed was sent.
        xbzrle_bytes: bytes of the records of those.
        xbzrle_unchanged: dirty pages in which nothing had changed, and which were not sent.
        xbzrle_overflow: pages that had changed so much that they were sent as they are.
        xbzrle_cache_miss: pages sent as they are since the cache did not have them.

    The last three only the writer knows.
    """

    normal: int = 0
    duplicate: int = 0
    xbzrle_pages: int = 0
    xbzrle_bytes: int = 0
    xbzrle_unchanged: int = 0
    xbzrle_overflow: int = 0
    xbzrle_cache_miss: int = 0


class PageReader:
    """Takes page records into a guest's RAM: ``load`` is what a `StreamParser` wants of its sink.

    A record without a name means the block of the one before, which may have come in an earlier
    call. Views of the memory are held within a call only. The first XBZRLE page takes a page of
    memory, in which it and later ones are decoded: RAM sees them when they are whole.

    Args:
        ram: the guest's; must stay open while pages are loaded.
    """

    def __init__(self, ram: GuestRam) -> None:
        self._blocks = {_name(guest): guest for guest in ram}
        self._name: bytes | None = None
        self._came: set[bytes] = set()
        self._counts = array("Q", bytes(8 * _stream.COUNTERS))
        self._decoded: bytearray | None = None

    @property
    def decoded_size(self) -> int:
        """Bytes of memory that XBZRLE pages are decoded in; 0 while there is none."""
        return 0 if self._decoded is None else len(self._decoded)

    def free_decoded(self) -> None:
        """Free that memory; another XBZRLE page takes it again. Not while `load` runs."""
        self._decoded = None

    @property
    def counters(self) -> PageCounters:
        """What was loaded so far."""
        return PageCounters(*self._counts)

    @property
    def missing(self) -> list[str]:
        """Names of the blocks of which no page has come."""
        return [g.block.idstr for name, g in self._blocks.items() if name not in self._came]

    def load(self, data: bytes | bytearray | memoryview, at: int = 0) -> int:
        """Take the page records at ``data[at:]`` into RAM.

        Args:
            data: bytes of the stream.
            at: where in ``data`` the first record begins.

        Returns:
            Where in ``data`` it stopped: at an incomplete record, which is to be given again with
            more behind it, or at a word that is not a page's.

        Raises:
            RemoteProtocolError: a record is wrong; ``at`` is where it begins in ``data``. Pages
                before it have been loaded.
        """
        while True:
            at, stop = self._load_block(data, at)
            if stop in (_stream.INCOMPLETE, _stream.OTHER_WORD):
                return at
            if stop == _stream.NO_DECODED:
                self._decoded = bytearray(TARGET_PAGE_SIZE)
                continue
            if stop != _stream.OTHER_BLOCK:
                raise self._refused(data, at, stop)
            end = at + 9 + data[at + 8]
            name = bytes(data[at + 9 : end])
            if name not in self._blocks:
                raise RemoteProtocolError(
                    f"a page of RAM block {_readable(name)} came, which was not listed", at=at
                )
            self._name = name
            self._came.add(name)

    def _load_block(self, data: bytes | bytearray | memoryview, at: int) -> tuple[int, int]:
        if self._name is None:
            return _stream.load_pages(data, at, None, None, -1, TARGET_PAGE_SIZE, self._counts)
        memory = self._blocks[self._name].memory
        with memory.view() as ram:
            return _stream.load_pages(
                data,
                at,
                self._name,
                ram,
                memory.fd,
                TARGET_PAGE_SIZE,
                self._counts,
                self._decoded,
            )

    def _refused(
        self, data: bytes | bytearray | memoryview, at: int, stop: int
    ) -> RemoteProtocolError:
        word = int.from_bytes(data[at : at + 8], "big")
        remedy = ""
        match stop:
            case _stream.NO_BLOCK:
                what = f"the first page (RAM word {word:#x}) does not name its RAM block"
            case _stream.COMPRESSED:
                what = f"a page came compressed (RAM word {word:#x}, COMPRESS_PAGE)"
                remedy = "switch the capability compress off at the source"
            case _stream.BAD_FLAGS:
                what = (
                    f"RAM section has word {word:#x}, allowed with a page are ZERO (2), PAGE (8) "
                    "or XBZRLE (0x40), and CONTINUE (0x20)"
                )
            case _stream.OUTSIDE:
                assert self._name is not None
                length = self._blocks[self._name].block.length
                what = (
                    f"a page of RAM block {_readable(self._name)} came for offset "
                    f"{word - word % TARGET_PAGE_SIZE:#x}, it has {length:#x} bytes"
                )
            case _stream.BAD_ENCODING:
                what = "an XBZRLE page has another encoding than 1"
            case _stream.TOO_LONG:
                what = f"an XBZRLE page has more than {TARGET_PAGE_SIZE} encoded bytes"
            case _:
                what = (
                    "an XBZRLE page is broken: its runs must be of 1 to 16383 bytes and end "
                    "within the page"
                )
        return RemoteProtocolError(what, remedy=remedy, at=at)


class XbzrleCache:
    """Pages that were sent, so that what changes in them can be sent instead of them.

    Without it memory is read once, with it each page is copied too: it pays where the link is
    slower than that and pages change little. Any thread may resize it while pages are encoded.

    Args:
        size: bytes of pages that it holds at most, rounded down to a power of two; the memory is
            taken as it fills.

    Attributes:
        age: the round of the migration (dirty-sync-count), which who counts rounds keeps here. A
            page that was sent in this or the previous round is not given up for another one.

    Raises:
        ValueError: less than a page.
        HostError: there is no memory for it.
    """

    def __init__(self, size: int = DEFAULT_CACHE_SIZE) -> None:
        self.age = 0
        self._lock = threading.Lock()
        self._size = _rounded(size)
        self._pages = _page_cache(self._size)

    @property
    def size(self) -> int:
        """Bytes of pages that it holds at most, a power of two."""
        return self._size

    def resize(self, size: int) -> int:
        """Make it larger or smaller, and keep what fits; return the new size, bytes.

        Raises:
            ValueError: less than a page; the cache stays as it was.
            HostError: there is no memory for it; the cache stays as it was.
        """
        rounded = _rounded(size)
        with self._lock:
            if rounded != self._size:
                pages = _page_cache(rounded)
                pages.take_over(self._pages)
                self._pages = pages
                self._size = rounded
        return rounded

    def clear(self) -> None:
        """Forget all pages: the destination does not have them, or not as they are here."""
        with self._lock:
            self._pages.clear()

    def __len__(self) -> int:
        """How many pages it holds now."""
        with self._lock:
            return len(self._pages)

    @contextlib.contextmanager
    def locked(self) -> Iterator[_stream.PageCache]:
        """The pages, which nobody else sees meanwhile."""
        with self._lock:
            yield self._pages


class Stage(Enum):
    """Where in the migration pages are encoded, for XBZRLE."""

    FIRST = "first"
    """All pages are sent for the first time; the cache is neither asked nor filled."""
    ROUND = "round"
    """What changed since is sent."""
    LAST = "last"
    """Nothing is sent after this; the cache is asked, and not filled any more."""


class PageWriter:
    """Encodes a guest's pages as records of the stream.

    Args:
        ram: the guest's; its memory may be written meanwhile, by who marks what it writes.
        xbzrle: has to be this writer's alone; None for no XBZRLE. It is emptied here.
    """

    def __init__(self, ram: GuestRam, xbzrle: XbzrleCache | None = None) -> None:
        self._ram = ram
        self._xbzrle = xbzrle
        self._out = bytearray()
        self._counts = array("Q", bytes(8 * _stream.COUNTERS))
        self._stage = Stage.ROUND
        self.stage = Stage.FIRST

    @property
    def counters(self) -> PageCounters:
        """What was encoded so far."""
        return PageCounters(*self._counts)

    @property
    def stage(self) -> Stage:
        """Where the migration is: FIRST until it is told otherwise."""
        return self._stage

    @stage.setter
    def stage(self, stage: Stage) -> None:
        if stage is Stage.FIRST and self._xbzrle is not None:
            self._xbzrle.clear()
        self._stage = stage

    def pieces(self, index: int, dirty: DirtyBitmap | None = None) -> Iterator[memoryview]:
        """Encode pages of one block, in order.

        Pages that were never written are announced as zero without being touched.

        Args:
            index: of the block, in stream order.
            dirty: the pages to encode, left as it is; None for all.

        Yields:
            At most PIECE_SIZE bytes of whole records, never none. The first record of each piece
            names the block, so that anything may come in between. The memory is used again: be
            done with a piece before you ask for the next.
        """
        if not self._out:
            # Not before: a transport that takes pages itself needs none of it.
            self._out = bytearray(PIECE_SIZE)
        guest = self._ram[index]
        pages = guest.block.length // TARGET_PAGE_SIZE
        name = _name(guest)
        words = None if dirty is None else dirty.words
        extent = array("Q", [0, 0])
        page = 0
        # Later, pages that are dirty were written, and where all of them are not, few are holes.
        fd = guest.memory.fd if self._stage is Stage.FIRST else -1
        while page < pages:
            with self._cache() as (cache, age), guest.memory.view() as ram:
                size, page = _stream.encode_pages(
                    ram,
                    page,
                    words,
                    name,
                    fd,
                    extent,
                    TARGET_PAGE_SIZE,
                    self._out,
                    self._counts,
                    cache,
                    guest.offset,
                    age,
                    self._stage is Stage.LAST,
                )
            if size:
                with memoryview(self._out) as out, out[:size] as piece:
                    yield piece

    @contextlib.contextmanager
    def _cache(self) -> Iterator[tuple[_stream.PageCache | None, int]]:
        if self._xbzrle is None or self._stage is Stage.FIRST:
            yield None, 0
            return
        with self._xbzrle.locked() as pages:
            yield pages, self._xbzrle.age


def _rounded(size: int) -> int:
    if size < TARGET_PAGE_SIZE:
        raise ValueError(f"an XBZRLE cache of {size} bytes; a page has {TARGET_PAGE_SIZE}")
    return 1 << (size.bit_length() - 1)


def _page_cache(size: int) -> _stream.PageCache:
    try:
        return _stream.PageCache(size // TARGET_PAGE_SIZE, TARGET_PAGE_SIZE)
    except (MemoryError, OverflowError):
        raise HostError(
            f"there is no memory for an XBZRLE cache of {size >> 20} MiB",
            remedy="set a smaller cache size",
        ) from None


def _name(guest: GuestBlock) -> bytes:
    return guest.block.idstr.encode("utf-8", "surrogateescape")


def _readable(name: bytes) -> str:
    return repr(name.decode("utf-8", "backslashreplace"))
