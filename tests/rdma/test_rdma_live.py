# SPDX-License-Identifier: Apache-2.0
"""A guest that writes all the time, from this process to another one, over RDMA."""

from __future__ import annotations

from pathlib import Path

import pytest
import rdma_kit as kit
from live_kit import (
    MIB,
    Destination,
    check_arrival,
    check_counters,
    check_throttled,
    check_too_fast,
    guest_of,
    start_to,
)

from rdma_mig.errors import HostError
from rdma_mig.memory.dirty import choose_tracker
from rdma_mig.migration.rdma import RdmaOptions

pytestmark = [pytest.mark.rdma, pytest.mark.deadline(180)]

MODES = [pytest.param(True, id="pin-all"), pytest.param(False, id="dynamic")]
SIZES = [64, 512]


def pace(mib_a_second):
    """A bandwidth that the device has with some to spare, and the downtime that QEMU allows.

    Where the processor is emulated there is less of the one and more of the other: as much RAM may
    be left for the end, or a guest that writes as before would not converge.
    """
    slow = kit.patience(1)
    return {"bandwidth_limit": int(mib_a_second * MIB / slow), "max_downtime": int(3e8 * slow)}


@pytest.mark.parametrize("mib", SIZES)
@pytest.mark.parametrize("pin_all", MODES)
def test_guest_goes_to_another_process(pin_all, mib):
    uri = f"rdma:{kit.device()[1]}:0"
    with Destination(uri, mib) as destination, guest_of(mib) as guest:
        guest.begin()
        state = start_to(destination.uri, guest, pin_all=pin_all, **pace(min(mib, 128)))
        check_arrival(state, guest, destination)
        check_counters(state)


@pytest.mark.parametrize("pin_all", MODES)
def test_what_the_kernel_finds_is_sent(pin_all):
    """The emulated machine's does. User Mode Linux has nothing for it, and that is said."""
    uri = f"rdma:{kit.device()[1]}:0"
    with Destination(uri, 32) as destination, guest_of(32) as guest:
        if "User Mode Linux" in Path("/proc/cpuinfo").read_text():
            with pytest.raises(HostError, match="cannot tell which pages are written"):
                choose_tracker(guest.ram, can_stop=True, registered=True)
            return
        guest.tracker = choose_tracker(guest.ram, can_stop=True, registered=True).tracker
        guest.begin()
        state = start_to(destination.uri, guest, pin_all=pin_all, **pace(64))
        check_arrival(state, guest, destination)


@pytest.mark.parametrize("pin_all", MODES)
def test_writer_faster_than_the_link_is_throttled_until_it_converges(pin_all):
    with (
        Destination(f"rdma:{kit.device()[1]}:0", 16) as destination,
        guest_of(16, pages=2048, rate=4000) as guest,
    ):
        guest.begin()
        state = start_to(
            destination.uri,
            guest,
            pin_all=pin_all,
            bandwidth_limit=8 * MIB,
            max_downtime=100_000_000,
            auto_converge=True,
        )
        check_throttled(state, guest, destination)
        check_counters(state)


@pytest.mark.parametrize("pin_all", MODES)
def test_writer_faster_than_the_link_ends_by_the_time_limit_and_says_so(pin_all):
    with (
        Destination(f"rdma:{kit.device()[1]}:0", 16) as destination,
        guest_of(16, pages=2048, rate=4000) as guest,
    ):
        guest.begin()
        state = start_to(
            destination.uri,
            guest,
            bandwidth_limit=8 * MIB,
            max_downtime=10_000_000,
            options=RdmaOptions(pin_all=pin_all, total_seconds=5),
        )
        check_too_fast(state, guest, destination)
