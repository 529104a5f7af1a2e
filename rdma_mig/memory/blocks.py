# SPDX-License-Identifier: Apache-2.0
"""RAM blocks and the chunks that RDMA cuts them into.

Wire: a chunk is 1 MiB, counted from the first byte of its own RAM block, whatever that byte's
address is; so both ends agree on chunk numbers without agreeing on addresses. The last chunk of
a block ends where the block does (docs/protocol.md, chunk arithmetic).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CHUNK_SIZE",
    "MAX_BLOCK_LENGTH",
    "TARGET_PAGE_SIZE",
    "RamBlock",
    "chunk_count",
    "chunk_of",
    "chunk_range",
]

CHUNK_SIZE = 1 << 20
"""Bytes of an RDMA chunk. Wire: chunk shift 20."""

TARGET_PAGE_SIZE = 4096
"""Bytes of a target page: the unit in which a migration tells pages apart (x86, page bits 12)."""

MAX_BLOCK_LENGTH = 1 << 52
"""More bytes than x86-64 can address: a longer RAM block is nonsense."""


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One RAM block as the migration stream lists it (docs/protocol.md, RAM section).

    Attributes:
        idstr: its name, 1 to 255 bytes, e.g. ``pc.ram``.
        length: its used length in bytes.
        page_size: the host page size of the block in bytes, where the source sent it
            (postcopy-ram, and it differs from the host's usual one).
        guest_address: its guest-physical address, where the source sent it (x-ignore-shared).

    Raises:
        ValueError: a value that no RAM block can have. What a peer sent is checked by the codec
            before it gets here.
    """

    idstr: str
    length: int
    page_size: int | None = None
    guest_address: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.idstr.encode("utf-8", "surrogateescape")) <= 255:
            raise ValueError(f"a RAM block's name has 1 to 255 bytes, not {self.idstr!r}")
        if not 1 <= self.length <= MAX_BLOCK_LENGTH:
            raise ValueError(f"RAM block {self.idstr!r}: length {self.length} is out of range")
        size = self.page_size
        if size is not None and (size < TARGET_PAGE_SIZE or size & (size - 1) or size > 1 << 40):
            raise ValueError(f"RAM block {self.idstr!r}: {size} is not a page size")
        if self.guest_address is not None and not 0 <= self.guest_address < 1 << 64:
            raise ValueError(
                f"RAM block {self.idstr!r}: guest address {self.guest_address} is out of range"
            )


def chunk_of(offset: int) -> int:
    """The chunk that holds the byte at ``offset`` of its block."""
    if offset < 0:
        raise ValueError(f"offset {offset} is negative")
    return offset // CHUNK_SIZE


def chunk_count(length: int) -> int:
    """How many chunks a block of ``length`` bytes has; the last may be shorter than the rest."""
    if length < 0:
        raise ValueError(f"length {length} is negative")
    return -(-length // CHUNK_SIZE)


def chunk_range(chunk: int, length: int) -> tuple[int, int]:
    """Offset and size in bytes of a chunk in a block of ``length`` bytes, cut at the block's end.

    Raises:
        IndexError: the block has no such chunk.
    """
    start = chunk * CHUNK_SIZE
    if not 0 <= start < length:
        raise IndexError(f"chunk {chunk} of a block of {length} bytes")
    return start, min(CHUNK_SIZE, length - start)
