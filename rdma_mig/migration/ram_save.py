# SPDX-License-Identifier: Apache-2.0
"""Pages of a guest onto a migration file: beside the stream where a transport can, else into it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rdma_mig.channel.counters import RamCounters
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.memory.page_stream import PageCounters, PageWriter
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.ram_control import RAM_SAVE_CONTROL_NOT_SUPP, ram_control_save_pages

__all__ = ["XbzrleRates", "ram_save_pages"]


@dataclass
class _Taken:
    """The ``bytes_sent`` of the hooks: 1 for each page that was taken."""

    value: int = 0


def ram_save_pages(
    file: QEMUFile,
    ram: GuestRam,
    index: int,
    dirty: DirtyBitmap | None = None,
    writer: PageWriter | None = None,
) -> int:
    """Send pages of a block: by the transport's hooks, or as records of the stream.

    ``file.counters`` are kept as a QEMU keeps its own: the transport counts pages when it issues
    them, and each page that it takes is a byte in ``transferred``.

    Args:
        file: the file being saved to, in a RAM phase.
        ram: the guest's.
        index: of the block.
        dirty: its pages to send; None for all.
        writer: of this migration, which knows its stage and XBZRLE cache; None for neither.

    Returns:
        Bytes to charge to the rate limit: of the pages that a transport took, zero pages too, or
        of the records.

    Raises:
        MigrationError: it could not be sent.
    """
    guest = ram[index]
    taken = _Taken()
    result = ram_control_save_pages(file, guest.offset, dirty, taken)
    if result != RAM_SAVE_CONTROL_NOT_SUPP:
        file.counters.transferred += taken.value
        return taken.value * TARGET_PAGE_SIZE
    writer = writer or PageWriter(ram)
    before, began = writer.counters, file.position
    for piece in writer.pieces(index, dirty):
        file.put(piece)
    _count(file.counters, before, writer.counters)
    file.counters.transferred += file.position - began
    return file.position - began


def _count(counters: RamCounters, before: PageCounters, after: PageCounters) -> None:
    more = {f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(after)}
    counters.normal_pages += more["normal"]
    counters.duplicate_pages += more["duplicate"]
    counters.xbzrle_pages += more["xbzrle_pages"]
    counters.xbzrle_bytes += more["xbzrle_bytes"]
    counters.xbzrle_overflow += more["xbzrle_overflow"]
    counters.xbzrle_cache_miss += more["xbzrle_cache_miss"]


class XbzrleRates:
    """Evaluates the XBZRLE counters period by period.

    Args:
        counters: ``xbzrle_cache_miss_rate`` and ``xbzrle_encoding_rate`` are kept there.
    """

    def __init__(self, counters: RamCounters) -> None:
        self._counters = counters
        self._pages = self._bytes = self._asked = self._missed = 0

    def evaluate(self) -> None:
        """End a period."""
        counters = self._counters
        asked = counters.xbzrle_pages + counters.xbzrle_overflow + counters.xbzrle_cache_miss
        missed, pages = counters.xbzrle_cache_miss, counters.xbzrle_pages
        if asked > self._asked:
            counters.xbzrle_cache_miss_rate = (missed - self._missed) / (asked - self._asked)
        if counters.xbzrle_bytes > self._bytes:
            plain = (pages - self._pages) * TARGET_PAGE_SIZE
            counters.xbzrle_encoding_rate = plain / (counters.xbzrle_bytes - self._bytes)
        self._asked, self._missed = asked, missed
        self._pages, self._bytes = pages, counters.xbzrle_bytes
