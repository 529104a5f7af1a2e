# SPDX-License-Identifier: Apache-2.0
"""The other host is gone, or this one's link is: packets are lost, or the wire is unplugged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rdma_kit as kit
from harness.wire import wait_until_gone

pytestmark = [pytest.mark.rdma, pytest.mark.root, pytest.mark.deadline(90)]

SCRIPT = Path(__file__).with_name("rdma_cut.py")
#: A peer that is gone is noticed within so many seconds, with the limits that a user has.
NOTICED = 15.0
AT_SOURCE = "still the source's"
AT_SNAPSHOT = "is unchanged"
COMMITTED = "`cont` there resumes it"


@pytest.fixture(autouse=True)
def _wire_goes() -> Iterator[None]:
    yield
    wait_until_gone()


def cut(role: str, step: str, how: str, whose: str, patience: str = "eager") -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, SCRIPT, role, step, how, whose, patience],
        check=False, capture_output=True, text=True, timeout=kit.patience(80),
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert "\n" not in told["line"]
    return told


STEPS = [
    ("incoming", "connected", AT_SOURCE),
    ("incoming", "in setup", AT_SOURCE),
    ("incoming", "in the last phase", AT_SOURCE),
    ("incoming", "RAM handed over", COMMITTED),
    ("incoming", "within the device state", COMMITTED),
    ("outgoing", "connected", AT_SNAPSHOT),
    ("outgoing", "blocks asked for", AT_SNAPSHOT),
    ("outgoing", "setup done", AT_SNAPSHOT),
    ("outgoing", "within the device state", AT_SNAPSHOT),
    ("outgoing", "end mark received", AT_SNAPSHOT),
]


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize(("role", "step", "owner"), STEPS)
def test_packets_that_are_lost(role: str, step: str, owner: str, whose: str):
    told = cut(role, step, "drop", whose)
    # At some steps a source says first what it did not get to.
    assert told["kind"] in ("PeerGone", "MigrationError")
    assert told["status"] == 1
    assert "has not answered" in told["line"] or "its host or process is gone" in told["line"]
    assert owner in told["line"]
    assert told["seconds"] < kit.patience(6)
    assert told["left"] == (["vm.incomplete"] if owner is COMMITTED else [])


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("role", "step", "owner"),
    [STEPS[2], STEPS[3], STEPS[7]],
)
def test_link_that_goes_down_is_named(role: str, step: str, owner: str, whose: str):
    told = cut(role, step, "unplug", whose)
    assert (told["kind"], told["status"]) == ("HostError", 3)
    device = "rmigw0" if role == "incoming" else "rmigw1"
    assert f"the link of this host's RDMA device {device} is down" in told["line"]
    assert owner in told["line"]
    assert told["seconds"] < kit.patience(6)


@pytest.mark.parametrize(
    ("role", "step"), [("incoming", "in the last phase"), ("outgoing", "within the device state")]
)
def test_limit_that_a_user_has(role: str, step: str):
    told = cut(role, step, "drop", "theirs", "patient")
    assert told["kind"] in ("PeerGone", "MigrationError")
    assert 3 < told["seconds"] < NOTICED + kit.patience(1)
