# SPDX-License-Identifier: Apache-2.0
"""The pages of a live guest that are still to be sent."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from rdma_mig import _pages
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.tracking import Tracking

__all__ = ["Backlog"]

_WORD_PAGES = 64
_SLICE_WORDS = 256  # 64 MiB of RAM: few enough slices in a large guest
_NOTHING = memoryview(array("Q", bytes(8 * _SLICE_WORDS)))


class Backlog:
    """A bitmap for each block, from which pages are taken in order, round after round.

    Args:
        ram: all of it is to be sent at first.

    Attributes:
        pages: that are still to be sent.
        passes: how often the end of RAM was reached.
    """

    def __init__(self, ram: GuestRam) -> None:
        self._marks = [_bitmap(guest.block.length) for guest in ram]
        self._taken = [_bitmap(guest.block.length) for guest in ram]
        for marks in self._marks:
            marks.fill()
        self.pages = sum(marks.pages for marks in self._marks)
        self.passes = 0
        self._block = 0
        self._word = 0

    def add_dirty(self, tracking: Tracking, *, at_rest: bool) -> int:
        """Fetch what was written since the last time; return how many pages that were."""
        found = tracking.harvest(self._marks, at_rest=at_rest)
        self.pages = sum(marks.count() for marks in self._marks)
        return found

    def take(self, size: int | None) -> Iterator[tuple[int, DirtyBitmap]]:
        """Take pages out, in as few calls as there are blocks.

        Args:
            size: bytes to take, more or less: pages go by groups of 64 and more; None for all.

        Yields:
            A block's index, and the pages to send, valid until the next.
        """
        left = self.pages if size is None else max(1, size // TARGET_PAGE_SIZE)
        step = min(_SLICE_WORDS, max(1, left // (8 * _WORD_PAGES)))
        while left > 0 and self.pages:
            taken = self._take_from_block(left, step)
            if taken:
                bitmap = self._taken[self._block]
                yield self._block, bitmap
                bitmap.fill(False)
                left -= taken
            if self._word * _WORD_PAGES >= self._marks[self._block].pages:
                self._word = 0
                self._block = (self._block + 1) % len(self._marks)
                self.passes += not self._block

    def _take_from_block(self, left: int, step: int) -> int:
        marks, batch = self._marks[self._block].words, self._taken[self._block].words
        taken = 0
        while taken < left and self._word < len(marks):
            end = min(self._word + step, len(marks))
            with marks[self._word : end] as part:
                count = _pages.count_bits(part)
                if count:
                    batch[self._word : end] = part
                    part[:] = _NOTHING[: end - self._word]
            taken += count
            self._word = end
        self.pages -= taken
        return taken


def _bitmap(length: int) -> DirtyBitmap:
    return DirtyBitmap.of_length(length)
