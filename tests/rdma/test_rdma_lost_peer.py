# SPDX-License-Identifier: Apache-2.0
"""Peers that are killed, stopped or cut off: a dead one is noticed, a slow one is waited for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rdma_kit as kit

from rdma_mig.errors import MigrationError, PeerGone
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.wire.control import ControlType

pytestmark = pytest.mark.rdma

SCRIPT = Path(__file__).with_name("rdma_peer.py")
# The limit on noticing that a peer is gone: probes after 3 s, unanswered for 11 s.
NOTICED = 15.0


class Process:
    """rdma_peer.py at work."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def line(self) -> str:
        """Its next line."""
        line = self.process.stdout.readline().rstrip("\n")
        assert line, "the peer ended"
        return line

    def close(self) -> None:
        """Kill it, stopped or not, and reap it."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def start() -> Iterator[type[Process]]:
    """Start peers; what is left of them is killed."""
    started: list[Process] = []

    def one(*arguments: str) -> Process:
        started.append(Process(*arguments))
        return started[-1]

    yield one
    for process in started:
        process.close()


def some(*steps: str, full: str) -> list:
    return [*steps, pytest.param(full, marks=pytest.mark.full)]


SOURCE_STEPS = some("in the last phase", "RAM handed over", full="connected")
DESTINATION_STEPS = some("in setup", full="within the device state")


@pytest.mark.parametrize("step", SOURCE_STEPS)
def test_killed_source_is_noticed(room, start, step):
    with kit.incoming(room / "vm") as end:
        peer = start("source", end.uri, step)
        assert peer.line() == step
        began = time.monotonic()
        peer.process.kill()
        end.fail(PeerGone, "closed the connection")
        assert time.monotonic() - began < NOTICED
    committed = step == "RAM handed over"
    assert [entry.name for entry in room.iterdir()] == (["vm.incomplete"] if committed else [])


@pytest.mark.parametrize("step", DESTINATION_STEPS)
def test_killed_destination_is_noticed(kept, address, start, step):
    peer = start("destination", address, step)
    with kit.outgoing(kept, peer.line()) as end:
        assert peer.line() == step
        began = time.monotonic()
        peer.process.kill()
        assert "is unchanged" in end.fail(MigrationError, "closed the connection").owner
        assert time.monotonic() - began < NOTICED


# Probes several times a second: what takes 15 s otherwise is seen in less than one.
EAGER = EndpointOptions(probe_seconds=0.1, silence_seconds=0.6)


def test_stopped_source_is_not_dead(room, start):
    with kit.incoming(room / "vm", endpoint=EAGER) as end:
        peer = start("source", end.uri, "in the last phase")
        peer.line()
        peer.process.send_signal(signal.SIGSTOP)
        assert not end.migration.wait(3), "it was given up"
        peer.process.send_signal(signal.SIGCONT)
        peer.process.stdin.close()
        end.fail(PeerGone, "closed the connection")


def test_stopped_destination_is_not_dead(kept, address, start):
    peer = start("destination", address, "in setup")
    with kit.outgoing(kept, peer.line(), endpoint=EAGER) as end:
        peer.line()
        peer.process.send_signal(signal.SIGSTOP)
        assert not end.migration.wait(3), "it was given up"
        peer.process.send_signal(signal.SIGCONT)
        peer.process.stdin.close()
        end.fail(MigrationError, "closed the connection")


def test_probes_ask_nothing_of_the_peer(room):
    """They take none of its receives, and it need not know of them."""
    with kit.incoming(room / "vm", endpoint=EAGER) as end, kit.dial(end.uri) as peer:
        steps = kit.act_as_source(peer)
        kit.until("RAM written", steps)
        time.sleep(2)
        kit.until("device state sent", steps)
        peer.close()
        end.succeed()


DEAD = "its host or process is gone|has not answered"


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (EndpointOptions(probe_seconds=0.5, silence_seconds=2.0), 2.5),
        pytest.param(EndpointOptions(), NOTICED, marks=pytest.mark.full),
    ],
)
def test_host_that_answers_no_more_is_noticed(room, options, limit):
    with kit.incoming(room / "vm", endpoint=options) as end, kit.dial(end.uri) as peer:
        kit.until("in the last phase", kit.act_as_source(peer))
        peer.expect(ControlType.READY)
        began = time.monotonic()
        peer.play_dead()
        error = end.fail(PeerGone, DEAD, seconds=30)
        assert time.monotonic() - began < limit + kit.patience(1)
        assert error.exit_status == 1
        assert "network" in error.remedy


@pytest.mark.full
def test_host_that_answers_no_more_is_noticed_by_a_sending_source(kept):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept()
        steps = kit.act_as_destination(peer)
        kit.until("setup done", steps)
        began = time.monotonic()
        peer.ready()
        peer.play_dead()
        end.fail(PeerGone, DEAD, seconds=30)
        assert time.monotonic() - began < NOTICED
