# SPDX-License-Identifier: Apache-2.0
"""Pages are counted when they are sent, and every kind of file carries the same RAM."""

from __future__ import annotations

import os

import pytest
import rdma_kit as kit
import snapshot_kit
from hooks_kit import CHUNK, PAGE, Counts, Destination, Engine, digests, run
from page_engine import PageSource, Pipe, load_pages

from rdma_mig.channel.counters import RamCounters
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.memory import RamBlock
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.events import Completed
from rdma_mig.migration.ram_control import acct_update_position

pytestmark = pytest.mark.rdma

# What a QEMU 7.2 moved in three rounds, and what its query-migrate called `transferred` then.
NORMAL, ZERO, ROUNDS = 98, 8224, 3
DYNAMIC_TRANSFERRED = 409754
assert DYNAMIC_TRANSFERRED == NORMAL * PAGE + (NORMAL + ZERO) + 8 * ROUNDS


@pytest.mark.parametrize("pin_all", [False, True], ids=["dynamic", "pin-all"])
def test_counters_are_those_of_a_qemu(engine, pin_all):
    """Nothing counts when it is offered; a run counts as a whole when it is issued."""
    block = RamBlock("toy.ram", (CHUNK + ZERO) * PAGE)
    found = []

    def save(file: QEMUFile, counts: Counts) -> None:
        source = PageSource(file, ram)
        source.setup()
        counters, before = file.counters, file.position
        assert counters == RamCounters()

        def first():
            for page in range(NORMAL):
                yield 0, page
            assert (counters.normal_pages, counters.duplicate_pages) == (0, 0)
            assert counters.transferred == NORMAL
            yield 0, CHUNK
            # The zeros behind them are pending, and what is data has been written, as one run.
            assert (counters.normal_pages, counters.duplicate_pages) == (NORMAL, 0)
            assert counts.new() == (1, NORMAL * PAGE)
            assert file.position - before == NORMAL * PAGE + 5 + 8  # a section's head, and HOOK
            yield 0, CHUNK + 1
            assert counters.duplicate_pages == 0
            for page in range(CHUNK + 2, 2 * CHUNK):
                yield 0, page
            yield 0, 2 * CHUNK
            assert (counters.normal_pages, counters.duplicate_pages) == (NORMAL, CHUNK)

        source.round(first())
        source.round((0, page) for page in range(2 * CHUNK + 1, 12 * CHUNK))
        source.round(((0, page) for page in range(12 * CHUNK, CHUNK + ZERO)), last=True)
        found.append(counters)
        file.put(snapshot_kit.STATE)
        file.flush()

    with GuestRam([block]) as ram:
        with ram[0].memory.view() as view:
            view[: NORMAL * PAGE] = snapshot_kit.noise(NORMAL * PAGE)
        run(engine.told()["uri"], ram, save, pin_all=pin_all)
        assert engine.told()["digests"] == digests(ram)
    (counters,) = found
    # With pin-all too: between our own ends zeros are not written to memory that is zero already.
    assert (counters.normal_pages, counters.normal_bytes) == (NORMAL, NORMAL * PAGE)
    assert (counters.duplicate_pages, counters.duplicate_bytes) == (ZERO, ZERO * PAGE)
    assert (counters.skipped_pages, counters.skipped_bytes) == (0, 0)
    assert counters.transferred == DYNAMIC_TRANSFERRED


def test_acct_update_position_on_any_file():
    file = QEMUFile(Pipe(-1))
    file.put(b"stream")
    acct_update_position(file, 3 * PAGE, False)
    acct_update_position(file, 2 * kit.MIB, True)
    assert file.counters == RamCounters(3, 2 * CHUNK, 0, 3 * PAGE)
    assert file.position == len(b"stream") + 3 * PAGE


@pytest.mark.parametrize("pin_all", [False, True], ids=["dynamic", "pin-all"])
def test_what_a_snapshot_has_sent_is_told(kept, pin_all):
    """With pin-all every page is written, without it a chunk without data is announced as zero."""
    # kit.paint() leaves the third chunk of pc.ram empty, and all of vga.vram, which is one.
    zero = 0 if pin_all else 2 * CHUNK
    total = sum(block.length for block in kit.BLOCKS) // PAGE
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri, pin_all=pin_all) as out:
        there = Destination.set_up(listener, pin_all=pin_all)
        there.serve(until=kit.DESCRIPTION)
        listener.peer.endpoint.disconnect()
        out.succeed()
    done = out.events[-1]
    assert isinstance(done, Completed)
    assert (done.normal_pages, done.duplicate_pages) == (total - zero, zero)
    assert done.bytes == done.normal_pages * PAGE
    assert sum(run.length for run in there.zero_runs) == zero * PAGE


def test_the_same_ram_arrives_over_rdma_and_over_a_file_without_hooks(ram):
    """Page by page, by one engine, in three rounds; pages change, or become zero, between them."""
    everything = [
        (guest.index, page) for guest in ram for page in range(guest.block.length // PAGE)
    ]
    original = []
    for guest in ram:
        with guest.memory.view() as view:
            # Zero: a whole chunk, some pages, the last one.
            view[kit.MIB : 2 * kit.MIB] = bytes(max(0, min(kit.MIB, len(view) - kit.MIB)))
            view[3 * PAGE : 9 * PAGE] = bytes(6 * PAGE)
            view[-PAGE:] = bytes(PAGE)
            original.append(bytes(view))
    changed = [(0, page) for page in (0, 4, 5, CHUNK + 7, 2 * CHUNK, 3 * CHUNK + 1)]
    finals = [(2, 31), (0, 0), (0, CHUNK + 7), (1, CHUNK - 1)]

    def save(file: QEMUFile, _counts: object = None) -> None:
        for guest, data in zip(ram, original, strict=True):
            with guest.memory.view() as view:
                view[:] = data
        source = PageSource(file, ram)
        source.setup()
        source.round(everything)
        write(changed, 7)
        source.round(changed)
        write(finals, 8)
        write([(0, CHUNK + 7)], None)
        source.round(finals, last=True)
        if file.hooks is not None:
            file.put(snapshot_kit.STATE)
        file.flush()

    def write(pages, seed: int | None) -> None:
        for index, page in pages:
            with ram[index].memory.view() as view:
                view[page * PAGE : (page + 1) * PAGE] = (
                    bytes(PAGE) if seed is None else snapshot_kit.noise(PAGE, seed + page)
                )

    arrived = {}
    read_end, write_end = os.pipe()
    with GuestRam(kit.BLOCKS) as there:
        out, into = QEMUFile(Pipe(write_end)), QEMUFile(Pipe(read_end))
        reader = kit.Worker(lambda: load_pages(into, there))
        save(out)
        out.close()
        assert reader.result() == 3
        into.close()
        arrived["pipe"] = digests(there)
        zeros = sum(
            not any(data[at : at + PAGE]) for data in original for at in range(0, len(data), PAGE)
        )
        assert out.counters.duplicate_pages == zeros + 1
        sent = len(everything) + len(changed) + len(finals)
        assert out.counters.normal_pages + out.counters.duplicate_pages == sent
    engine = Engine(2)
    try:
        for pin_all in (True, False):
            run(engine.told()["uri"], ram, save, pin_all=pin_all)
            arrived[pin_all] = engine.told()["digests"]
    finally:
        assert engine.close() == ""
    wanted = digests(ram)
    assert arrived == {"pipe": wanted, True: wanted, False: wanted}
