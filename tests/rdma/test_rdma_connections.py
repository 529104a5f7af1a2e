# SPDX-License-Identifier: Apache-2.0
"""RAM over several connections: who may open them, what goes over which, and when a phase ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rdma_command as command
import rdma_kit as kit
import snapshot_kit
from harness import differences, snapshot_blocks
from harness.wire import wait_until_gone

from rdma_mig.errors import (
    LocalProtocolError,
    MigrationCancelled,
    MigrationTimeout,
    PeerGone,
    RemoteProtocolError,
)
from rdma_mig.migration.events import Connected, Warned
from rdma_mig.migration.rdma import RdmaOptions
from rdma_mig.snapshot import Snapshot
from rdma_mig.trace.reading import read_trace
from rdma_mig.trace.rules import check_records
from rdma_mig.transport import outgoing, side_connections
from rdma_mig.verbs.endpoint import Endpoint
from rdma_mig.waits import Deadline
from rdma_mig.wire.control import ControlMessage, ControlType
from rdma_mig.wire.handshake import (
    FEATURE_FINAL_ACK,
    FEATURE_FRESH_BLOCKS,
    FLAG_PIN_ALL,
    MAX_CONNECTIONS,
    Extension,
    PrivateData,
)

pytestmark = pytest.mark.rdma

MODES = [pytest.param(True, id="pin-all"), pytest.param(False, id="dynamic")]
NONCE = 77
#: What a raw source meets when its destination gives up: its end, or ERROR where READY is due.
GIVEN_UP = (PeerGone, AssertionError)
SCRIPT = Path(__file__).with_name("rdma_reorder.py")


def asked(beside: int, number: int = 0, nonce: int = NONCE) -> bytes:
    """Private data of a source that wants so many connections beside the first."""
    return PrivateData(
        1, FLAG_PIN_ALL, Extension(FEATURE_FINAL_ACK, nonce, beside, number)
    ).encode()


Opened = list[tuple[Endpoint, list[Endpoint]]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """The connections of each source of this process: the first, and those beside it."""
    found: Opened = []
    open_all = side_connections.open_side_connections

    def note(first: Endpoint, *rest: Any) -> list[Endpoint]:
        found.append((first, open_all(first, *rest)))
        return found[-1][1]

    monkeypatch.setattr(outgoing, "open_side_connections", note)
    return found


def check_equal(one: Path, other: Path) -> None:
    """Compare the RAM of two snapshots, byte by byte."""
    with Snapshot.open(other) as snapshot:
        snapshot.verify()
    assert not differences(snapshot_blocks(one), snapshot_blocks(other))


# ---- between our own ends ----


@pytest.mark.parametrize("return_path", [False, True], ids=["", "return-path"])
@pytest.mark.parametrize("pin_all", MODES)
@pytest.mark.parametrize("count", [2, 3, MAX_CONNECTIONS])
def test_ram_goes_over_all_of_them(
    count: int, pin_all: bool, return_path: bool, tmp_path: Path, room: Path, opened: Opened
):
    with snapshot_kit.guest(kit.BLOCKS) as memories:
        for number, memory in enumerate(memories):
            with memory.view() as view:
                view[4096:8192] = snapshot_kit.noise(4096, number)
        kept = snapshot_kit.keep(tmp_path / "kept", memories, kit.BLOCKS)
    # How often the device is open is not looked at: librdmacm keeps it so once it has used it.
    before = kit.resources() | {"ctx": 1 << 30}
    with (
        command.incoming(f"rdma:{kit.device()[1]}:0", room / "vm") as into,
        kit.outgoing(
            kept, into.uri, pin_all=pin_all, connections=count, return_path=return_path
        ) as out,
    ):
        out.succeed()
        came = into.events()
    check_equal(kept, room / "vm")
    assert command.event(came, "connected")["connections"] == count
    assert [event.connections for event in out.events if isinstance(event, Connected)] == [count]
    assert not any(
        isinstance(event, Warned) and "connections" in event.message for event in out.events
    )
    [(_first, beside)] = opened
    assert len(beside) == count - 1
    # Three blocks that hold data, each in a stripe of its own: on the first three connections. What
    # else completes beside the first is the end of two phases.
    writing = [each.queue.completions > 2 for each in beside]
    assert writing == [number < 3 for number in range(1, count)]
    kit.settle(before)


def test_traces_of_both_ends_keep_the_rules(kept: Path, room: Path, tmp_path: Path):
    went, came = tmp_path / "out", tmp_path / "in"
    uri = f"rdma:{kit.device()[1]}:0"
    with command.incoming(uri, room / "vm", "--trace", str(came)) as into:
        out = command.run("outgoing", kept, into.uri, "--trace", went, "--connections", "3", "-v")
        assert out.returncode == 0, out.stderr
        into.events()
    assert "3 connections" in out.stdout + out.stderr
    assert command.run("trace", "check", went, came).returncode == 0
    for path in (went, came):
        records = list(read_trace(path))
        check_records(records)
        messages = [each for each in records if each.record.kind in ("in", "out")]
        ends = [each["channel"] for each in messages if each["type"] == "REGISTER_FINISHED"]
        assert sorted(set(ends)) == ["connection-1", "connection-2", "control"]
        assert len(ends) % 3 == 0


@pytest.mark.parametrize("count", [0, -1, MAX_CONNECTIONS + 1])
def test_number_that_is_none(count: int):
    with pytest.raises(LocalProtocolError, match="allowed are 1 to 16"):
        RdmaOptions(connections=count)


@pytest.mark.parametrize("reply", [
    pytest.param(kit.PLAIN, id="QEMU"),
    pytest.param(PrivateData(1, FLAG_PIN_ALL, Extension(0, NONCE)).encode(), id="ours-of-one"),
])  # fmt: skip
def test_destination_that_takes_one_gets_one(kept: Path, reply: bytes, opened: Opened):
    with kit.RawListener() as listener:
        listener.serve("all received", reply)
        # How it ends is not the matter: the raw destination has no word for it.
        with kit.outgoing(kept, listener.uri, connections=4) as end, contextlib.suppress(PeerGone):
            end.migration.wait(kit.patience(20))
        assert PrivateData.decode(listener.asked).extension.beside == 3
    assert [beside for _first, beside in opened] == [[]]
    [warned] = [event.message for event in end.events if isinstance(event, Warned)]
    assert "takes 1 of 4 connections" in warned


# ---- a source that misbehaves ----


@contextlib.contextmanager
def source_of(uri: str, beside: int, opened: int) -> Iterator[tuple[kit.Peer, list[kit.Peer]]]:
    """A source that wants some connections beside the first, and opens some."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(kit.dial(uri, asked(beside)))
        yield (
            first,
            [
                stack.enter_context(kit.dial(uri, asked(beside, number)))
                for number in range(1, opened + 1)
            ],
        )


def send_guest(
    first: kit.Peer, beside: list[kit.Peer], said: Callable[[kit.Peer, int], None]
) -> None:
    """Behave well; ``said`` is called for each of those beside the first before a phase ends."""
    steps = kit.act_as_source(first)
    for phase, step in enumerate(("blocks known", "RAM written")):
        kit.until(step, steps)
        for peer in beside:
            said(peer, phase)
    kit.until("device state sent", steps)


def end_phase(peer: kit.Peer, _phase: int = 0) -> None:
    peer.send(ControlMessage(ControlType.REGISTER_FINISHED))


def test_source_is_granted_what_it_asks_for_up_to_a_limit(room: Path):
    for wanted, granted in ((1, 1), (15, 15), (16, 15), (65535, 15)):
        with kit.incoming(room / "vm") as end, kit.dial(end.uri, asked(wanted)) as first:
            reply = PrivateData.decode(first.endpoint.private_data).extension
            assert reply == Extension(FEATURE_FINAL_ACK, NONCE, granted)
            first.close()
            end.fail(PeerGone)


def test_phase_ends_when_it_has_ended_on_all(room: Path):
    with kit.incoming(room / "vm") as end, source_of(end.uri, 2, 2) as (first, beside):
        send_guest(first, beside, end_phase)
        assert first.expect(ControlType.FINAL_ACK)
        first.close()
        end.succeed()


def test_end_that_does_not_come_on_one_of_them(room: Path):
    def said(peer: kit.Peer, phase: int) -> None:
        if phase == 0 or peer is beside[0]:
            end_phase(peer)

    with (
        kit.incoming(room / "vm", stall_seconds=1) as end,
        source_of(end.uri, 2, 2) as (first, beside),
    ):
        with pytest.raises(GIVEN_UP):
            send_guest(first, beside, said)
        end.fail(MigrationTimeout, "the end of the RAM phase on connection 2")
    assert not list(room.iterdir())


@pytest.mark.parametrize("kind", [ControlType.READY, ControlType.QEMU_FILE, ControlType.ERROR])
def test_message_that_has_no_place_there(room: Path, kind: ControlType):
    payload = b"x" if kind is ControlType.QEMU_FILE else b""
    kinds = (PeerGone, "reported a failure") if kind is ControlType.ERROR else (
        RemoteProtocolError, f"{kind.name} where REGISTER_FINISHED was due")  # fmt: skip
    with kit.incoming(room / "vm") as end, source_of(end.uri, 1, 1) as (first, beside):
        with pytest.raises(GIVEN_UP):
            send_guest(first, beside, lambda peer, _: peer.send(ControlMessage(kind, payload)))
        end.fail(*kinds)
    assert not list(room.iterdir())


def test_connection_that_is_announced_and_not_opened(room: Path):
    with kit.incoming(room / "vm") as end, source_of(end.uri, 3, 2) as (first, beside):
        with pytest.raises(GIVEN_UP):
            send_guest(first, beside, end_phase)
        end.fail(RemoteProtocolError, "announced 3 connections .* did not open number 3")
    assert not list(room.iterdir())


def test_connection_that_ends_by_itself(room: Path):
    def leave(peer: kit.Peer, phase: int) -> None:
        if phase and peer is beside[1]:
            peer.close()
        else:
            end_phase(peer)

    with kit.incoming(room / "vm") as end, source_of(end.uri, 2, 2) as (first, beside):
        with pytest.raises(GIVEN_UP):
            send_guest(first, beside, leave)
        end.fail(PeerGone, "connection 2")
    assert not list(room.iterdir())


@pytest.mark.parametrize(("request_", "reason"), [
    pytest.param(asked(2, 3), "connection 3 of a migration that has 2", id="beyond"),
    pytest.param(asked(2, 65535), "connection 65535", id="far-beyond"),
    pytest.param(asked(2, 1), "has this one", id="twice"),
    pytest.param(asked(2, 2, NONCE + 1), "another migration", id="nonce"),
    pytest.param(kit.PLAIN, "another migration", id="QEMU"),
])  # fmt: skip
def test_connection_that_is_none_of_this_migrations(room: Path, request_: bytes, reason: str):
    with (
        kit.incoming(room / "vm") as end,
        kit.dial(end.uri, asked(2)) as first,
        kit.dial(end.uri, asked(2, 1)) as one,
    ):
        before = kit.resources()["qp"]
        with pytest.raises(PeerGone, match=reason), kit.dial(end.uri, request_):
            pytest.fail("it was accepted")
        assert kit.resources()["qp"] == before
        # It has cost the migration nothing.
        with kit.dial(end.uri, asked(2, 2)) as two:
            send_guest(first, [one, two], end_phase)
            assert first.expect(ControlType.FINAL_ACK)
            first.close()
            end.succeed()


# ---- a destination that misbehaves ----


def test_destination_that_grants_and_does_not_take_them(kept: Path):
    features = FEATURE_FINAL_ACK | FEATURE_FRESH_BLOCKS
    with kit.RawListener() as listener:
        reply = PrivateData(1, FLAG_PIN_ALL, Extension(features, NONCE, 2)).encode()
        accepted = kit.Worker(lambda: listener.accept(reply))
        with kit.outgoing(kept, listener.uri, connections=3) as end:
            peer = accepted.result()
            # Whoever dispatches its events turns away what comes beside it.
            with pytest.raises(PeerGone):
                peer.receive()
            error = end.fail(PeerGone, "connection 1 beside the first failed")
    assert "--connections 1" in error.remedy


def test_cancelled_while_a_phase_ends(room: Path):
    with kit.incoming(room / "vm") as end, source_of(end.uri, 1, 1) as (first, _beside):
        kit.until("setup done", kit.act_as_source(first))
        # Only its connection beside the first is silent now.
        with pytest.raises(MigrationTimeout):
            first.endpoint.wait(first.verbs.WAIT_RECEIVE, "READY", Deadline.after(0.3))
        end.migration.cancel()
        end.fail(MigrationCancelled, "the end of the RAM phase on connection 1")
    assert not list(room.iterdir())


# ---- a network that lets packets overtake each other ----


@pytest.mark.root
@pytest.mark.deadline(240)
@pytest.mark.parametrize("mode", ["pin-all", "dynamic"])
def test_guest_that_writes_arrives_whole_over_a_network_that_reorders(mode: str):
    """One of four connections lags behind the others, and what it carries is written again."""
    done = subprocess.run(
        [sys.executable, SCRIPT, mode],
        check=False, capture_output=True, text=True, timeout=kit.patience(200),
    )  # fmt: skip
    wait_until_gone()
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    # Packets of at most 4 KiB, over a quarter of 64 MiB.
    assert told["reordered"] > 4000
    assert told["connections"] == 4
    print(done.stdout)
