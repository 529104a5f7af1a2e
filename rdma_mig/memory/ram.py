# SPDX-License-Identifier: Apache-2.0
"""A guest's RAM: its blocks in stream order, each with the memory that holds it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rdma_mig.closing import Closing
from rdma_mig.errors import HostError
from rdma_mig.memory.blocks import CHUNK_SIZE, RamBlock
from rdma_mig.memory.guest import GuestMemory
from rdma_mig.memory.meminfo import available_memory, huge_page_size

__all__ = ["GuestBlock", "GuestRam", "require_memory"]

# What this process needs beside the guest's RAM.
_OVERHEAD = 96 << 20


def require_memory(lengths: Iterable[int], *, huge_pages: bool = False) -> None:
    """Refuse a guest that does not fit into this host, before any of its RAM is taken.

    Args:
        lengths: bytes of the RAM blocks that its source announces.
        huge_pages: as for `GuestRam`; what they hold is not taken from what is available.

    Raises:
        HostError: they and what this process needs are more than is available.
    """
    size = huge_page_size() if huge_pages else 0
    total = sum(length for length in lengths if not size or length % size)
    available = available_memory()
    if total + _OVERHEAD > available:
        raise HostError(
            f"the source announces {total >> 20} MiB of RAM and this host has "
            f"{available >> 20} MiB available",
            remedy="free memory here, or migrate to a host with more",
        )


@dataclass(frozen=True, slots=True)
class GuestBlock:
    """One block and its memory.

    Attributes:
        index: position in stream order, which is how the wire names it after setup.
        block: name and length.
        memory: its bytes.
        offset: where it begins in this end's RAM address space (``ram_addr_t``), bytes.
    """

    index: int
    block: RamBlock
    memory: GuestMemory
    offset: int


class GuestRam(Closing):
    """All RAM of one guest; a context manager that frees the memory.

    Args:
        blocks: in stream order. The memory is allocated here, and costs nothing until touched.
        huge_pages: use huge pages that were set aside, for the blocks of whole ones.

    Attributes:
        at_rest: nobody writes to it any more until it is closed, as when it was loaded from a
            snapshot: what is zero stays zero.

    Raises:
        HostError: the memory cannot be had.
    """

    def __init__(self, blocks: Sequence[RamBlock], *, huge_pages: bool = False) -> None:
        self.at_rest = False
        self._blocks: list[GuestBlock] = []
        offset = 0
        try:
            for index, block in enumerate(blocks):
                memory = GuestMemory(block.length, block.idstr, huge_pages=huge_pages)
                self._blocks.append(GuestBlock(index, block, memory, offset))
                offset += -(-block.length // CHUNK_SIZE) * CHUNK_SIZE
        except BaseException:
            self.close()
            raise
        self._by_offset = {guest.offset: guest for guest in self._blocks}

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[GuestBlock]:
        return iter(self._blocks)

    def __getitem__(self, index: int) -> GuestBlock:
        return self._blocks[index]

    @property
    def total(self) -> int:
        """Bytes of all blocks."""
        return sum(guest.block.length for guest in self._blocks)

    @property
    def lengths(self) -> list[int]:
        """Bytes of each block, in stream order."""
        return [guest.block.length for guest in self._blocks]

    def at_offset(self, offset: int) -> GuestBlock:
        """Return the block that begins at ``offset`` of the RAM address space.

        Raises:
            ValueError: no block begins there.
        """
        try:
            return self._by_offset[offset]
        except KeyError:
            raise ValueError(f"no RAM block begins at offset {offset:#x}") from None

    def populate(self, should_stop: Callable[[], bool]) -> None:
        """Allocate every page, so that registering is quick and cannot run out of memory.

        Raises:
            HostError: there is not enough memory.
            MigrationCancelled: ``should_stop`` said so.
        """
        for guest in self._blocks:
            guest.memory.populate(should_stop)

    def map_data(self, should_stop: Callable[[], bool]) -> None:
        """Map the chunks that have pages, so that registering them takes no fault a page.

        Raises: as populate().
        """
        for guest in self._blocks:
            guest.memory.map_data(CHUNK_SIZE, should_stop)

    def close(self) -> None:
        """Free the memory; every region over it must be closed. Idempotent."""
        with contextlib.ExitStack() as stack:
            for guest in self._blocks:
                stack.callback(guest.memory.close)
