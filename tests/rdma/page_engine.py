# SPDX-License-Identifier: Apache-2.0
"""An engine that hands each page to the hooks, and puts into the stream what they do not take.

Both ends of it, for a file with hooks or without: pages in the stream are the words of QEMU's RAM
section (offset and flags in eight bytes, the block's name where it changes, then the page).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable

import rdma_kit as kit

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.memory.ram import GuestBlock, GuestRam
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_FINISH,
    RAM_CONTROL_ROUND,
    RAM_CONTROL_SETUP,
    RAM_SAVE_CONTROL_DELAYED,
    RAM_SAVE_CONTROL_NOT_SUPP,
    ram_control_after_iterate,
    ram_control_before_iterate,
    ram_control_save_page,
)
from rdma_mig.wire.stream import (
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_EOS,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_ZERO,
    StreamBlock,
    encode_eos,
    encode_footer,
    encode_head,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)

PAGE = 4096
Round = Iterable[tuple[int, int]]
"""Pages to send: (block, page)."""


class PageSource:
    """Sends RAM in rounds, the last of them as the end of the section."""

    def __init__(self, file: QEMUFile, ram: GuestRam) -> None:
        self.file = file
        self.ram = ram
        self._last: GuestBlock | None = None

    def setup(self) -> None:
        """The stream up to the first round."""
        blocks = [StreamBlock(guest.block.idstr, guest.block.length) for guest in self.ram]
        self.file.put(encode_head("toy-1.0") + encode_ram_start(kit.RAM_ID, blocks))
        ram_control_before_iterate(self.file, RAM_CONTROL_SETUP)
        ram_control_after_iterate(self.file, RAM_CONTROL_SETUP)
        self.file.put(encode_eos() + encode_footer(kit.RAM_ID))

    def round(self, pages: Round, *, last: bool = False) -> None:
        """Send these pages; count the word that ends the round as QEMU does."""
        flags = RAM_CONTROL_FINISH if last else RAM_CONTROL_ROUND
        self.file.put((encode_section_end if last else encode_section_part)(kit.RAM_ID))
        ram_control_before_iterate(self.file, flags)
        self._last = None
        for index, page in pages:
            self.page(self.ram[index], page)
        ram_control_after_iterate(self.file, flags)
        self.file.put(encode_eos() + encode_footer(kit.RAM_ID))
        self.file.counters.transferred += 8

    def page(self, guest: GuestBlock, page: int) -> None:
        """Send a page: by the hook if it takes it, else through the stream."""
        sent = ctypes.c_int(0)
        result = ram_control_save_page(self.file, guest.offset, page * PAGE, PAGE, sent)
        if result == RAM_SAVE_CONTROL_DELAYED:
            self.file.counters.transferred += sent.value
            return
        assert (result, sent.value) == (RAM_SAVE_CONTROL_NOT_SUPP, 0)
        with guest.memory.view() as view:
            data = bytes(view[page * PAGE : (page + 1) * PAGE])
        zero = not any(data)
        flag = RAM_SAVE_FLAG_ZERO if zero else RAM_SAVE_FLAG_PAGE
        name = b""
        if self._last is guest:
            flag |= RAM_SAVE_FLAG_CONTINUE
        else:
            idstr = guest.block.idstr.encode()
            name = bytes([len(idstr)]) + idstr
            self._last = guest
        record = (page * PAGE | flag).to_bytes(8, "big") + name + (b"\0" if zero else data)
        self.file.put(record)
        counters = self.file.counters
        counters.transferred += len(record)
        if zero:
            counters.duplicate_pages += 1
        else:
            counters.normal_pages += 1


class Pipe:
    """A byte channel without hooks: one end of a pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> None:
        """Write all of it."""
        while data:
            data = data[os.write(self._descriptor, data) :]

    def read(self) -> bytes:
        """What is there; empty at the end."""
        return os.read(self._descriptor, 65536)

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def load_pages(file: QEMUFile, ram: GuestRam) -> int:
    """Load the RAM of a file without hooks up to its end; return the rounds."""
    take = _reader(file)
    blocks = [StreamBlock(guest.block.idstr, guest.block.length) for guest in ram]
    head = encode_head("toy-1.0") + encode_ram_start(kit.RAM_ID, blocks)
    assert take(len(head)) == head
    names = {guest.block.idstr: guest for guest in ram}
    rounds = 0
    while True:
        guest = None
        while (word := int.from_bytes(take(8), "big")) != RAM_SAVE_FLAG_EOS:
            offset, flags = word - word % PAGE, word % PAGE
            if not flags & RAM_SAVE_FLAG_CONTINUE:
                guest = names[take(take(1)[0]).decode()]
            flags &= ~RAM_SAVE_FLAG_CONTINUE
            if flags == RAM_SAVE_FLAG_ZERO:
                data = take(1) * PAGE
            else:
                assert flags == RAM_SAVE_FLAG_PAGE, f"word {word:#x}"
                data = take(PAGE)
            with guest.memory.view() as view:
                view[offset : offset + PAGE] = data
        assert take(5) == encode_footer(kit.RAM_ID)
        following = take(5, at_end=True)
        if not following:
            return rounds
        rounds += 1
        assert following in (encode_section_part(kit.RAM_ID), encode_section_end(kit.RAM_ID))


def _reader(file: QEMUFile) -> Callable[..., bytes]:
    buffer = bytearray()

    def take(size: int, *, at_end: bool = False) -> bytes:
        while len(buffer) < size:
            more = file.get()
            if not more:
                assert at_end, "the stream ends too early"
                assert not buffer, "the stream ends within a record"
                return b""
            buffer.extend(more)
        data = bytes(buffer[:size])
        del buffer[:size]
        return data

    return take
