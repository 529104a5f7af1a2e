# SPDX-License-Identifier: Apache-2.0
"""XBZRLE and zero pages by the names of migration.h."""

from __future__ import annotations

import threading
import time

import pytest
from live_kit import BLOCKS, MIB, PAGE, WritingGuest, migrate

import rdma_mig.migration as header
from rdma_mig.errors import LocalProtocolError


class Generations:
    """A guest's tracker that dirties its pages itself, a few times, and then never again.

    Args:
        dirty: does it; called with the number of the generation, from 1, and returns how many
            pages from the first on it has written.
    """

    atomic = True

    def __init__(self, count, dirty):
        self.left = count
        self.dirty = dirty
        self.number = 0

    def start(self):
        pass

    def stop(self):
        pass

    def harvest(self, index, into):
        if index or self.number == self.left:
            return 0
        self.number += 1
        pages = self.dirty(self.number)
        into.set(0, pages)
        return pages


def test_xbzrle_counts_and_its_cache_is_resized_while_it_runs(current, guest, connection, receiver):
    seen = {}

    def dirty(number):
        if number == 10:
            seen.update(header.do_info_migrate())
            seen["resized"] = header.xbzrle_cache_resize(2 * MIB)
        with guest.ram[0].memory.view() as view:
            for page in range(64):
                view[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "big")
        return 64

    guest.tracker = Generations(20, dirty)
    header.migrate_set_capability("xbzrle")
    assert header.xbzrle_cache_resize(5 * MIB) == 4 * MIB == header.migrate_xbzrle_cache_size()
    with pytest.raises(ValueError, match="a page has 4096"):
        header.xbzrle_cache_resize(100)
    assert header.migrate_xbzrle_cache_size() == 4 * MIB
    migrate(current, guest, connection, max_downtime=0)
    assert seen["xbzrle-cache"]["cache-size"] == 4 * MIB
    assert seen["resized"] == header.migrate_xbzrle_cache_size() == 2 * MIB
    # The first generation is found in setup, and the second one is what fills the cache.
    assert header.xbzrle_mig_pages_cache_miss() == 64
    pages, size = header.xbzrle_mig_pages_transferred(), header.xbzrle_mig_bytes_transferred()
    assert pages == 18 * 64
    assert pages * 12 < size < pages * 40
    assert header.xbzrle_mig_pages_overflow() == 0
    assert guest.digests() == receiver.digests()


def test_cache_miss_rate_of_a_period(current, guest, connection, receiver):
    def dirty(number):
        time.sleep(0.02 if number < 60 else 0)
        with guest.ram[0].memory.view() as view:
            # More pages than the cache holds: each one is missed.
            for page in range(64):
                view[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "big")
        return 64

    guest.tracker = Generations(70, dirty)
    header.migrate_set_capability("xbzrle")
    header.xbzrle_cache_resize(PAGE)
    migrate(current, guest, connection, max_downtime=0)
    assert 0.9 < header.xbzrle_mig_cache_miss_rate() <= 1
    assert header.xbzrle_mig_pages_cache_miss() > 1000


def test_cache_gives_pages_up_that_were_not_sent_for_two_rounds(
    current, guest, connection, receiver
):
    """So that it follows a guest that turns to other memory; each fetch of marks is a round."""

    class Turning(Generations):
        def harvest(self, index, into):
            if index or self.number == self.left:
                return 0
            self.number += 1
            first = 0 if self.number < 6 else 64
            with guest.ram[0].memory.view() as view:
                for page in range(first, first + 64):
                    view[page * PAGE : page * PAGE + 8] = self.number.to_bytes(8, "big")
            into.set(first, 64)
            return 64

    guest.tracker = Turning(20, None)
    header.migrate_set_capability("xbzrle")
    header.xbzrle_cache_resize(64 * PAGE)
    migrate(current, guest, connection, max_downtime=0)
    # Generation 1 is found in setup, 2 fills the cache; 6 does not get in yet, 7 does.
    assert header.xbzrle_mig_pages_cache_miss() == 3 * 64
    assert header.xbzrle_mig_pages_transferred() == (3 + 13) * 64
    assert guest.digests() == receiver.digests()


def test_xbzrle_overflow_is_counted(current, guest, connection, receiver):
    fill = bytes(range(1, 256)) * 40

    def dirty(number):
        with guest.ram[0].memory.view() as view:
            view[: 2 * PAGE] = fill[number : number + 2 * PAGE]
        return 2

    guest.tracker = Generations(5, dirty)
    header.migrate_set_capability("xbzrle")
    migrate(current, guest, connection, max_downtime=0)
    assert header.xbzrle_mig_pages_overflow() == 2 * 3
    assert header.xbzrle_mig_pages_transferred() == 0
    assert guest.digests() == receiver.digests()


def test_xbzrle_buffers(current):
    old, new = bytes(PAGE), bytearray(PAGE)
    new[100:108] = b"changed!"
    dst = bytearray(PAGE)
    size = header.xbzrle_encode_buffer(old, new, PAGE, dst, PAGE)
    assert bytes(dst[:size]) == b"\x64\x08changed!"
    assert header.xbzrle_encode_buffer(new, new, PAGE, dst, PAGE) == 0
    assert header.xbzrle_encode_buffer(old, new, PAGE, bytearray(PAGE), 9) == -1
    size = header.xbzrle_encode_buffer(old, new, PAGE, dst, PAGE)
    page = bytearray(PAGE)
    assert header.xbzrle_decode_buffer(dst, size, page, PAGE) == 108
    assert page == new
    assert header.xbzrle_decode_buffer(dst, size, bytearray(PAGE), 107) == -1
    assert header.xbzrle_decode_buffer(dst, 1, page, PAGE) == -1
    header.ram_handle_compressed(page, 7, 50)
    assert page[:51] == b"\7" * 50 + b"\0"
    with pytest.raises(ValueError, match="of a buffer of"):
        header.ram_handle_compressed(page, 0, PAGE + 1)


def test_page_that_xbzrle_is_decoded_in_is_freed_at_the_end(current, guest, connection):
    """It is there from the first XBZRLE page on, and nobody frees it under who loads."""
    from rdma_mig.migration.live import LiveSource
    from rdma_mig.migration.state import Migration

    reached, go_on = threading.Event(), threading.Event()
    with WritingGuest(BLOCKS) as source, Migration() as sender:

        def dirty(number):
            if number == 10:
                reached.set()
                go_on.wait(20)
            with source.ram[0].memory.view() as view:
                for page in range(64):
                    view[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "big")
            return 64

        source.tracker = Generations(12, dirty)
        sender.state.max_downtime = 0
        sender.state.enabled_capabilities[header.MigrationCapability.XBZRLE] = True
        file, engine = connection[0], LiveSource(source)
        sender.run(lambda: engine.save(sender, file, file.channel), "sender")
        header.migrate_set_guest(guest)
        header.free_xbzrle_decoded_buf()
        loader = threading.Thread(target=header.process_incoming_migration, args=connection[1:])
        loader.start()
        try:
            assert reached.wait(20)
            wait_until(lambda: current.page_reader.decoded_size == PAGE)
            with pytest.raises(LocalProtocolError, match="still being loaded"):
                header.free_xbzrle_decoded_buf()
        finally:
            go_on.set()
            loader.join()
        sender.wait(20)
        assert source.digests() == guest.digests()
    reader = current.page_reader
    assert reader.counters.xbzrle_pages > 0
    assert reader.decoded_size == 0
    reader.load(xbzrle_record())
    assert reader.decoded_size == PAGE
    header.free_xbzrle_decoded_buf()
    assert reader.decoded_size == 0


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def xbzrle_record():
    """Page 0 of the first block: its first byte changes."""
    name = BLOCKS[0].idstr.encode()
    return (0x40).to_bytes(8, "big") + bytes([len(name)]) + name + b"\1\0\3\0\1x"
