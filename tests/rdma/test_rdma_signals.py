# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end ``rdma-migrate`` at each step: status 5, two seconds, one line.

The other end is a peer that behaves well up to the step, and then waits.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import rdma_command as command
import rdma_kit as kit

from rdma_mig.errors import PeerGone
from rdma_mig.wire.control import ControlType
from rdma_mig.wire.handshake import FEATURE_FINAL_ACK, Extension, PrivateData

pytestmark = [
    pytest.mark.rdma,
    pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM]),
]

OURS = PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode()


def until_it_waits() -> None:
    time.sleep(0.2)


def listening(process: subprocess.Popen[str]) -> str:
    """Where it listens, as soon as it does."""
    return json.loads(process.stdout.readline())["uri"]


def last_word(peer: kit.Peer) -> ControlType | None:
    """What it said last before it disconnected."""
    said = None
    try:
        while True:
            said = peer.receive().type
    except PeerGone:
        return said


@pytest.fixture(autouse=True)
def _nothing_left(address: str):
    with kit.RawListener():
        pass  # librdmacm keeps a context of the device once it has been used
    before = kit.resources()
    yield
    kit.settle(before)


@pytest.mark.parametrize("step", ["listening", *kit.SOURCE_STEPS])
def test_incoming(address: str, room: Path, step: str, number: int):
    where = f"rdma:{address}:0"
    with command.started("incoming", where, "-o", room / "vm", "--json") as process:
        uri = listening(process)
        if step == "listening":
            line = command.interrupted(process, number)
        else:
            with kit.dial(uri) as peer:
                kit.until(step, kit.act_as_source(peer))
                if step == kit.SOURCE_STEPS[-1]:
                    until_it_waits()
                else:
                    peer.expect(ControlType.READY)
                line = command.interrupted(process, number)
                assert last_word(peer) is ControlType.ERROR
    assert "cancelled" in line
    handed = step in kit.SOURCE_STEPS[kit.COMMITTED :]
    assert ("`cont` there" if handed else "still the source's") in line
    assert [path.name for path in room.iterdir()] == (["vm.incomplete"] if handed else [])


@pytest.mark.parametrize("step", ["not accepted", *kit.DESTINATION_STEPS])
def test_outgoing(kept: Path, step: str, number: int):
    with (
        kit.RawListener() as listener,
        command.started("outgoing", kept, listener.uri, "--rdma-pin-all", "--json") as process,
    ):
        if step == "not accepted":
            listener.listener.events.wait(kit.Deadline.after(kit.patience(20)), listener.cancel)
        else:
            kit.until(step, kit.act_as_destination(listener.accept(OURS, 20)))
        until_it_waits()
        line = command.interrupted(process, number)
    assert "cancelled" in line
    assert f"the snapshot in {kept} is unchanged" in line
