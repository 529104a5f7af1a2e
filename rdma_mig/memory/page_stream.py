# SPDX-License-Identifier: Apache-2.0
"""Pages in the migration stream: how they travel where no transport moves them beside it.

Wire: docs/protocol.md, pages in the stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from rdma_mig import _stream
from rdma_mig.errors import RemoteProtocolError
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.memory.ram import GuestBlock, GuestRam

__all__ = ["PIECE_SIZE", "PageReader", "PageWriter"]

PIECE_SIZE = 1 << 20
"""Most bytes that `PageWriter` encodes at a time."""


class PageReader:
    """Takes page records into a guest's RAM: ``load`` is what a `StreamParser` wants of its sink.

    A record without a name means the block of the one before, which may have come in an earlier
    call. Views of the memory are held within a call only.

    Args:
        ram: the guest's; must stay open while pages are loaded.
    """

    def __init__(self, ram: GuestRam) -> None:
        self._blocks = {_name(guest): guest for guest in ram}
        self._name: bytes | None = None

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
                before it have been loaded, and an XBZRLE page may be half patched.
        """
        while True:
            at, stop = self._load_block(data, at)
            if stop in (_stream.INCOMPLETE, _stream.OTHER_WORD):
                return at
            if stop != _stream.OTHER_BLOCK:
                raise self._refused(data, at, stop)
            end = at + 9 + data[at + 8]
            name = bytes(data[at + 9 : end])
            if name not in self._blocks:
                raise RemoteProtocolError(
                    f"a page of RAM block {_readable(name)} came, which was not listed", at=at
                )
            self._name = name

    def _load_block(self, data: bytes | bytearray | memoryview, at: int) -> tuple[int, int]:
        if self._name is None:
            return _stream.load_pages(data, at, None, None, -1, TARGET_PAGE_SIZE)
        memory = self._blocks[self._name].memory
        with memory.view() as ram:
            return _stream.load_pages(data, at, self._name, ram, memory.fd, TARGET_PAGE_SIZE)

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


@dataclass(slots=True)
class PageCounters:
    """What `PageWriter` has encoded, pages.

    Attributes:
        normal: as they are.
        duplicate: all bytes zero, so that none was put into the stream.
    """

    normal: int = 0
    duplicate: int = 0


class PageWriter:
    """Encodes a guest's pages as records of the stream.

    Args:
        ram: the guest's; its memory may be written meanwhile, by who marks what it writes.

    Attributes:
        counters: pages encoded so far.
    """

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._out = bytearray(PIECE_SIZE)
        self._counts = array("Q", bytes(8 * _stream.COUNTERS))

    @property
    def counters(self) -> PageCounters:
        """Pages encoded so far."""
        counts = self._counts
        return PageCounters(counts[_stream.NORMAL], counts[_stream.DUPLICATE])

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
        guest = self._ram[index]
        pages = guest.block.length // TARGET_PAGE_SIZE
        name = _name(guest)
        words = None if dirty is None else dirty.words
        extent = array("Q", [0, 0])
        page = 0
        while page < pages:
            with guest.memory.view() as ram:
                size, page = _stream.encode_pages(
                    ram,
                    page,
                    words,
                    name,
                    guest.memory.fd,
                    extent,
                    TARGET_PAGE_SIZE,
                    self._out,
                    self._counts,
                )
            if size:
                with memoryview(self._out) as out, out[:size] as piece:
                    yield piece


def _name(guest: GuestBlock) -> bytes:
    return guest.block.idstr.encode("utf-8", "surrogateescape")


def _readable(name: bytes) -> str:
    return repr(name.decode("utf-8", "backslashreplace"))
