# SPDX-License-Identifier: Apache-2.0
"""What became of the guest's pages: counted when they are sent, not when they are offered."""

from __future__ import annotations

from dataclasses import dataclass

from rdma_mig.memory.blocks import TARGET_PAGE_SIZE

__all__ = ["RamCounters"]


@dataclass(slots=True)
class RamCounters:
    """Counters of the RAM of one migration, under the names of migration.h.

    A transport that sends pages later counts a run of them when it issues the run
    (docs/protocol.md, RAM phases). Pages are of 4096 bytes.

    Attributes:
        normal_pages: sent as data.
        duplicate_pages: all bytes alike, which is all zero: announced instead of sent.
        skipped_pages: not sent at all; no transport here skips any, nor does a QEMU.
        transferred: bytes that went to the destination, as query-migrate counts them. The data
            of issued runs is added here; what was put into the stream, and the 1 for each page
            that a transport took, is for the caller to add.
        xbzrle_pages: sent as what has changed in them.
        xbzrle_bytes: bytes of those in the stream.
        xbzrle_overflow: had changed so much that they were sent as data.
        xbzrle_cache_miss: sent as data since the cache did not have them.
        xbzrle_cache_miss_rate: part of the pages of the last period that the cache did not have.
        xbzrle_encoding_rate: how many times fewer bytes were sent in it than those pages have.
    """

    normal_pages: int = 0
    duplicate_pages: int = 0
    skipped_pages: int = 0
    transferred: int = 0
    xbzrle_pages: int = 0
    xbzrle_bytes: int = 0
    xbzrle_overflow: int = 0
    xbzrle_cache_miss: int = 0
    xbzrle_cache_miss_rate: float = 0.0
    xbzrle_encoding_rate: float = 0.0

    @property
    def normal_bytes(self) -> int:
        """Bytes of normal_pages."""
        return self.normal_pages * TARGET_PAGE_SIZE

    @property
    def duplicate_bytes(self) -> int:
        """Bytes of RAM in duplicate_pages; far fewer were sent for them."""
        return self.duplicate_pages * TARGET_PAGE_SIZE

    @property
    def skipped_bytes(self) -> int:
        """Bytes of skipped_pages."""
        return self.skipped_pages * TARGET_PAGE_SIZE

    def issued(self, size: int, *, zero: bool) -> None:
        """Count a run of ``size`` bytes, whole pages: written, or announced as zero."""
        pages = size // TARGET_PAGE_SIZE
        if zero:
            self.duplicate_pages += pages
        else:
            self.normal_pages += pages
            self.transferred += size
