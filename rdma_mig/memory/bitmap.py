# SPDX-License-Identifier: Apache-2.0
"""Which pages of a RAM block are dirty."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from rdma_mig import _pages
from rdma_mig.memory.blocks import CHUNK_SIZE, TARGET_PAGE_SIZE

__all__ = ["DirtyBitmap"]


class DirtyBitmap:
    """A bit per page, kept in 64-bit words with bit 0 of word 0 first, as QEMU keeps it.

    All work that goes by the page is done in Cython without the GIL. Bits behind the last page
    are always clear.

    Args:
        pages: how many pages the block has.
    """

    __slots__ = ("_words", "pages")

    def __init__(self, pages: int) -> None:
        if pages < 0:
            raise ValueError(f"a bitmap of {pages} pages")
        self.pages = pages
        self._words = array("Q", bytes(8 * -(-pages // 64)))

    @classmethod
    def of_length(cls, length: int, page_size: int = TARGET_PAGE_SIZE) -> DirtyBitmap:
        """A bitmap for ``length`` bytes; a part of a page at the end counts as a page."""
        return cls(-(-length // page_size))

    @property
    def words(self) -> memoryview:
        """The words themselves, for Cython and for whoever harvests dirty pages elsewhere."""
        return memoryview(self._words)

    def __len__(self) -> int:
        return self.pages

    def _end(self, first: int, count: int) -> int:
        if first < 0 or count < 0 or first + count > self.pages:
            raise IndexError(f"{count} pages from {first} in a bitmap of {self.pages}")
        return first + count

    def __getitem__(self, page: int) -> bool:
        self._end(page, 1)
        return bool(self._words[page >> 6] >> (page & 63) & 1)

    def set(self, first: int, count: int = 1) -> None:
        """Mark ``count`` pages from ``first``; ``IndexError`` when there are none such."""
        _pages.assign_bits(self._words, first, self._end(first, count), True)

    def clear(self, first: int, count: int = 1) -> None:
        """Unmark ``count`` pages from ``first``; ``IndexError`` when there are none such."""
        _pages.assign_bits(self._words, first, self._end(first, count), False)

    def fill(self, value: bool = True) -> None:
        """Mark, or unmark, every page."""
        _pages.assign_bits(self._words, 0, self.pages, value)

    def mark_data(
        self,
        data: bytes | bytearray | memoryview,
        page_size: int = TARGET_PAGE_SIZE,
        first: int = 0,
    ) -> int:
        """Mark the pages of ``data`` that hold anything but zeros; return how many there are.

        ``data`` begins with page ``first`` of the block. It is read, and where it is a fresh
        memfd, reading allocates: skip the holes (``GuestMemory.next_data``).
        """
        self._end(first, -(-len(data) // page_size))
        return _pages.mark_data(data, page_size, self._words, first)

    def count(self) -> int:
        """How many pages are marked."""
        return _pages.count_bits(self._words)

    def runs(
        self,
        max_bytes: int = CHUNK_SIZE,
        *,
        length: int | None = None,
        page_size: int = TARGET_PAGE_SIZE,
        boundary: int = CHUNK_SIZE,
        batch: int = 4096,
    ) -> Iterator[memoryview]:
        """The marked pages as runs, in order, in batches of at most ``batch``.

        Args:
            max_bytes: the longest run, a multiple of ``page_size``.
            length: bytes of the block, where its last page is not a whole one.
            page_size: bytes a bit stands for.
            boundary: no run crosses a multiple of this many bytes; 0 for no such limit.
                Wire: a write that was announced by chunk must not leave its chunk.
            batch: runs to find at a time.

        Yields:
            ``[offset, size, offset, size, ...]`` in bytes, 64-bit words, never empty. The memory
            is used again for the next batch. Marks that change meanwhile may be seen or missed.
        """
        out = array("Q", bytes(16 * batch))
        at = 0
        size = self.pages * page_size if length is None else length
        if size > self.pages * page_size:
            raise ValueError(f"{size} bytes do not fit {self.pages} pages of {page_size}")
        while at < self.pages:
            count, at = _pages.bitmap_runs(
                self._words, at, self.pages, page_size, size, max_bytes, boundary, out
            )
            if count:
                yield memoryview(out)[: 2 * count]
