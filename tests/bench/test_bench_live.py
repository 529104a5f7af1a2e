# SPDX-License-Identifier: Apache-2.0
"""The guests of `make bench` that dirty memory at a pace, and what is said of their downtime."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from harness import PAGE_SIZE, check_counters
from live import Downtime, Pace, summary
from paced import BURST, MIB, START, PacedGuest, PacedProcess, Seen, interval_of


def test_interval_is_that_of_a_burst_and_fits_the_guests_word():
    assert interval_of(BURST * PAGE_SIZE * 1000, 2e9) == 2_000_000
    assert interval_of(1e15, 1e9) == 1
    assert interval_of(1, 1e9) == (1 << 32) - 1


def test_guest_of_a_qemu_is_told_what_to_dirty():
    guest = PacedGuest.dirtying_at(64 * MIB, 256e6, cycles=2e9)
    words = struct.unpack_from("<4sIIIII", guest.image(), 0x1D0)
    assert words == (b"RMP1", START, START + 64 * MIB, BURST, 200_000_000, guest.interval)
    with pytest.raises(ValueError, match="no multiple"):
        PacedGuest.dirtying_at(PAGE_SIZE, 1.0)


def test_what_was_seen_of_a_guest_is_its_clock_and_its_pace():
    before, after = Seen(10.0, 1000, 0), Seen(12.0, 5000, 512)
    assert after.cycles_a_second(before) == 2000
    assert after.pace(before) == MIB


@pytest.mark.parametrize(("kept", "agreed"), [(500.0, 500.0), (460.0, 500.0), (440.0, 440.0)])
def test_ours_is_no_faster_than_a_qemus_guest(kept, agreed):
    pace = Pace(wire=1000.0, asked=500.0, kept=kept)
    assert pace.agreed == agreed
    assert ("half the wire's" in str(pace)) is (agreed == 500.0)


def test_row_is_the_median_of_the_rounds_ratios():
    pace = Pace(wire=1e9, asked=5e8, kept=5e8)
    theirs = [Downtime(0.2, 0.19, 5e8), Downtime(0.1, 0.1, 5e8), Downtime(0.4, 0.4, 5e8)]
    ours = [Downtime(0.1, 0.09, 5e8), Downtime(0.2, 0.2, 5e8), Downtime(0.1, 0.1, 5e8)]
    found = summary("dynamic", pace, theirs, ours)
    assert found["value"] == 0.5
    assert found["met"]
    assert found["what"].endswith("dynamic: downtime, of QEMU to QEMU's")
    assert found["detail"].startswith("100 ms beside 200; [0.25, 2];")
    assert not summary("dynamic", pace, ours, theirs)["met"]


def test_process_keeps_its_pace_rests_when_it_is_held_and_marks_what_it_writes(tmp_path: Path):
    """A pace that any machine keeps; a busy one may be late, and catches up."""
    size = 4 * MIB
    with PacedProcess(24 * MIB, size, 32 * MIB, tmp_path) as guest:
        assert guest.seen().written == 0
        guest.load_state((5).to_bytes(8, "big"))
        guest.resume()
        end = time.monotonic() + 30
        while (seen := guest.seen()).written < 2000:
            assert time.monotonic() < end, "it does not write"
            time.sleep(0.01)
        guest.stop()
        rests = guest.seen()
        assert seen.first < rests.last
        assert (rests.written - 5) % BURST == 0
        pages = (rests.last - rests.first) / 1e9 * 32 * MIB / PAGE_SIZE
        assert rests.written <= pages + 5 + BURST
        time.sleep(0.02)
        assert guest.seen().written == rests.written
        assert guest.save_state() == rests.written.to_bytes(8, "big")
        with guest.ram[0].memory.view() as view:
            raw = bytes(view[START : START + size])
        if rests.written > guest.pages + 5:  # a whole pass, so that all pages say something
            found = check_counters(raw, 0, guest.pages)
            assert found.passes * guest.pages + found.cursor == rests.written
        marks = [bit for word in guest.marks for bit in f"{word:064b}"[::-1]]
        first = START // PAGE_SIZE
        assert set(marks[:first]) == {"0"}
        assert marks[first : first + guest.pages].count("1") == min(rests.written - 5, guest.pages)
