# SPDX-License-Identifier: Apache-2.0
"""A guest that writes all the time, from this process to another one, through the header."""

from __future__ import annotations

import contextlib

import pytest
from live_kit import (
    MIB,
    Destination,
    check_arrival,
    check_throttled,
    check_too_fast,
    guest_of,
    start_to,
)

from rdma_mig.memory.dirty import choose_tracker
from rdma_mig.migration.channels import ChannelOptions

# MiB of the guest, MiB a second of the link, and milliseconds that the guest may rest. A machine
# that is busy with other tests carries less at the end than before, so the small one has more time.
SIZES = [(64, 16, 600), pytest.param((512, 128, 300), marks=pytest.mark.full)]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes[0]))
@pytest.mark.parametrize("tracker", ["marks", "kernel"])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_guest_goes_to_another_process(tmp_path, scheme, tracker, sizes):
    mib, limit, downtime = sizes
    uri = {"tcp": "tcp:127.0.0.1:0", "unix": f"unix:{tmp_path}/socket"}[scheme]
    with Destination(uri, mib) as destination, guest_of(mib) as guest:
        if tracker == "kernel":
            guest.tracker = choose_tracker(guest.ram, can_stop=True).tracker
        guest.begin()
        state = start_to(
            destination.uri, guest, bandwidth_limit=limit * MIB, max_downtime=downtime * 1_000_000
        )
        check_arrival(state, guest, destination)


# MiB of the guest, MiB of it that are written, pages a second, and MiB a second of the link.
TOO_FAST = [(16, 8, 4000, 8), pytest.param((512, 64, 30000, 32), marks=pytest.mark.full)]


@contextlib.contextmanager
def too_fast(sizes):
    """A destination, and a guest that is at work already."""
    mib, written, rate, _limit = sizes
    with (
        Destination("tcp:127.0.0.1:0", mib) as destination,
        guest_of(mib, pages=written * MIB // 4096, rate=rate) as guest,
    ):
        guest.begin()
        yield destination, guest


@pytest.mark.parametrize("sizes", TOO_FAST, ids=lambda sizes: str(sizes[0]))
def test_writer_faster_than_the_link_is_throttled_until_it_converges(sizes):
    limit = sizes[3]
    with too_fast(sizes) as (destination, guest):
        state = start_to(
            destination.uri,
            guest,
            bandwidth_limit=limit * MIB,
            max_downtime=100_000_000,
            auto_converge=True,
        )
        check_throttled(state, guest, destination)


@pytest.mark.parametrize("sizes", TOO_FAST, ids=lambda sizes: str(sizes[0]))
def test_writer_faster_than_the_link_ends_by_the_time_limit_and_says_so(sizes):
    mib, limit = sizes[0], sizes[3]
    with too_fast(sizes) as (destination, guest):
        state = start_to(
            destination.uri,
            guest,
            bandwidth_limit=limit * MIB,
            max_downtime=10_000_000,
            options=ChannelOptions(total_seconds=5 if mib < 100 else 30),
        )
        check_too_fast(state, guest, destination)
