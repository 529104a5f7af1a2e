# SPDX-License-Identifier: Apache-2.0
"""The live loop between two guests of this process: rounds, the stop, failures, convergence."""

from __future__ import annotations

import time

import pytest
from live_kit import MIB, PAGE, Pair, WritingGuest

from rdma_mig.channel.plain import PlainIncoming
from rdma_mig.errors import MigrationCancelled, MigrationError
from rdma_mig.memory import RamBlock
from rdma_mig.migration.guests import SnapshotGuest
from rdma_mig.migration.status import MigrationStatus
from rdma_mig.snapshot import Snapshot

BLOCKS = (RamBlock("live.ram", 16 * MIB), RamBlock("live.more", 3 * MIB + 8192))


@pytest.fixture
def guests():
    with WritingGuest(BLOCKS) as source, WritingGuest(BLOCKS) as destination:
        with source.ram[0].memory.view() as view:
            view[2 * MIB : 12 * MIB] = b"data" * (10 * MIB // 4)
        with source.ram[1].memory.view() as view:
            view[5 * PAGE : 9 * PAGE] = b"data" * PAGE
        with destination.ram[0].memory.view() as view:
            view[10 * MIB : 11 * MIB] = b"old" * (MIB // 3) + b"x"
        yield source, destination


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def test_what_a_guest_wrote_to_the_last_arrives(guests):
    source, destination = guests
    source.begin()
    with Pair(source, destination) as pair:
        pair.out.state.bandwidth_limit = 20 * MIB
        pair.start()
        pair.wait()
    state = pair.out.state
    assert source.calls == ["stop"]
    assert destination.calls == ["resume"]
    assert source.digests() == destination.digests()
    assert destination.written == source.written > 0
    assert state.status is MigrationStatus.COMPLETED
    # What was written meanwhile was sent again.
    assert state.dirty_sync_count >= 3
    assert state.counters.normal_pages > 10 * MIB // PAGE + 64 + 4
    assert state.precopy_bytes > state.downtime_bytes > 0
    assert 0 <= state.downtime <= state.max_downtime / 1e6
    assert not source.marks.started


def test_guest_that_rests_goes_at_one_pass(guests):
    source, destination = guests
    source.tracker = None
    with Pair(source, destination) as pair:
        pair.start()
        pair.wait()
    assert source.digests() == destination.digests()
    total = sum(block.length for block in BLOCKS) // PAGE
    counters = pair.out.state.counters
    assert counters.normal_pages + counters.duplicate_pages == total


def test_snapshot_and_process_are_guests_of_one_engine(guests, tmp_path):
    source, destination = guests
    source.begin()
    with SnapshotGuest(tmp_path / "vm") as kept, Pair(source, kept) as pair:
        pair.start()
        pair.wait()
    with Snapshot.open(tmp_path / "vm") as snapshot:
        snapshot.verify()
        assert snapshot.machine == "live-1.0"
    with SnapshotGuest(tmp_path / "vm") as kept, Pair(kept, destination) as pair:
        pair.start()
        pair.wait()
    assert source.digests() == destination.digests()
    assert destination.written == source.written > 0


@pytest.mark.parametrize("moment", ["first round", "later round"])
def test_cancelled_in_a_round_the_guest_goes_on_here(guests, moment):
    source, destination = guests
    source.begin()
    with Pair(source, destination) as pair:
        state = pair.out.state
        state.bandwidth_limit = MIB // 4 if moment == "first round" else 8 * MIB
        pair.start()
        rounds = 1 if moment == "first round" else 4
        wait_for(lambda: state.rounds >= rounds)
        pair.out.cancel()
        with pytest.raises(MigrationCancelled, match=r"the guest is still here"):
            pair.wait()
    assert state.status is MigrationStatus.CANCELLED
    assert "stop" not in source.calls
    assert destination.calls == []
    before = source.written
    wait_for(lambda: source.written > before)
    assert not source.marks.started


def test_destination_that_cannot_load_gives_the_guest_back(guests):
    source, destination = guests
    destination.load_error = MigrationError("no room for devices")
    source.begin()
    with Pair(source, destination) as pair:
        pair.start()
        with pytest.raises(MigrationError, match=r"failed \(status 1\).*the guest is still here"):
            pair.wait()
    assert source.calls == ["stop", "resume"]
    assert destination.calls == []


def test_word_that_got_lost_leaves_the_guest_at_rest(guests, monkeypatch):
    source, destination = guests
    monkeypatch.setattr(PlainIncoming, "shut", lambda end, _seconds: end.close())
    with Pair(source, destination) as pair:
        pair.start()
        with pytest.raises(MigrationError, match=r"is not known, so it rests here"):
            pair.wait()
    assert source.calls == ["stop"]


def test_other_machine_is_refused_and_the_guest_goes_on(guests):
    source, destination = guests
    destination.machine = "live-2.0"
    source.begin()
    with Pair(source, destination) as pair:
        pair.start()
        with pytest.raises(MigrationError, match="the guest is still here"):
            pair.out.wait(30)
        with pytest.raises(MigrationError, match=r"machine 'live-1\.0', this is 'live-2\.0'"):
            pair.into.wait(30)
    assert "stop" not in source.calls


def test_tracker_that_is_not_atomic_gets_a_guest_at_rest(guests):
    source, destination = guests
    seen = []
    harvest, start = source.marks.harvest, source.marks.start
    source.marks.atomic = False

    def started():
        seen.append(source.running.is_set())
        start()

    def watched(index, into):
        seen.append(source.running.is_set())
        return harvest(index, into)

    source.marks.harvest, source.marks.start = watched, started
    source.begin()
    with Pair(source, destination) as pair:
        pair.start()
        pair.wait()
    assert not any(seen)
    assert source.digests() == destination.digests()
    assert source.calls[-1] == "stop"
    assert source.calls[:-1] == ["stop", "resume"] * (len(source.calls) // 2)


# ---- pace ----


def test_bandwidth_limit_holds(guests):
    source, destination = guests
    source.tracker = None
    with source.ram[0].memory.view() as view:
        view[:] = b"\1" * len(view)
    with Pair(source, destination) as pair:
        pair.out.state.bandwidth_limit = 16 * MIB
        began = time.monotonic()
        pair.start()
        pair.wait()
        took = time.monotonic() - began
    # 16 MiB and a little, of which the last window's 1.6 MiB need no waiting.
    assert 0.8 < took < 5
