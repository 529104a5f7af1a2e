# SPDX-License-Identifier: Apache-2.0
"""The return path: who may open it, what is said on it and when, and what its loss means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rdma_kit as kit
import snapshot_kit

from rdma_mig.errors import (
    MigrationError,
    MigrationTimeout,
    PeerGone,
    RemoteProtocolError,
    SnapshotError,
)
from rdma_mig.snapshot import Snapshot
from rdma_mig.verbs.events import EventChannel
from rdma_mig.wire.control import ControlMessage, ControlType
from rdma_mig.wire.handshake import FEATURE_FINAL_ACK, FLAG_PIN_ALL, Extension, PrivateData
from rdma_mig.wire.return_path import Pong, Shut
from rdma_mig.wire.stream import CommandType, StreamBlock, encode_command, encode_ram_start

pytestmark = pytest.mark.rdma

PING = 7
HEAD = (
    snapshot_kit.HEAD
    + encode_command(CommandType.OPEN_RETURN_PATH)
    + encode_command(CommandType.PING, PING.to_bytes(4, "big"))
    + encode_ram_start(kit.RAM_ID, [StreamBlock(block.idstr, block.length) for block in kit.BLOCKS])
)
AT_SOURCE = "still the source's"


def listen(peer: kit.Peer) -> bytes:
    """As a source: ask for the next frame of the return path, and wait for it."""
    peer.ready()
    return peer.expect(ControlType.QEMU_FILE)


def say(peer: kit.Peer, frame: bytes) -> None:
    """As a destination: say something on the return path, without waiting to be asked."""
    peer.send(ControlMessage(ControlType.QEMU_FILE, frame, repeat=0))


def send_guest(peer: kit.Peer, second: kit.Peer, until: str = "device state sent") -> Iterator[str]:
    """As a source with a return path, behave well up to this step."""
    steps = kit.act_as_source(peer, HEAD)
    kit.until("in setup", steps)
    assert listen(second) == Pong(PING).encode()
    if until != "in setup":
        kit.until(until, steps)
    return steps


# ---- a destination of ours ----


def test_last_word_comes_when_the_snapshot_is_on_disk(room: Path):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer, kit.dial(end.uri) as second:
        send_guest(peer, second)
        second.ready()
        word = second.expect(ControlType.QEMU_FILE)
        # At this very moment: not when it has had time for it.
        there = (room / "vm.incomplete" / "manifest.json").exists()
        named = (room / "vm").exists()
        assert word == Shut(0).encode()
        assert there
        assert not named
        peer.close()
        end.succeed()
    assert "on its return path" in end.events[-1].confirmed
    with Snapshot.open(room / "vm") as snapshot:
        snapshot.verify()
        # The commands were the source's and this migration's: they are not the machine's.
        assert snapshot.config == snapshot_kit.HEAD


def test_nothing_is_said_unasked(room: Path):
    with (
        kit.incoming(room / "vm", stall_seconds=1) as end,
        kit.dial(end.uri) as peer,
        kit.dial(end.uri) as second,
    ):
        peer.stream(HEAD)
        error = end.fail(MigrationTimeout, "READY")
        assert AT_SOURCE in str(error)
        with pytest.raises(PeerGone):
            second.receive()
    assert not list(room.iterdir())


def test_source_that_does_not_ask_for_the_last_word(room: Path):
    """It may be that it has let go of its guest: what is here loses its name, and nothing else."""
    with (
        kit.incoming(room / "vm", stall_seconds=1) as end,
        kit.dial(end.uri) as peer,
        kit.dial(end.uri) as second,
    ):
        send_guest(peer, second)
        error = end.fail(MigrationTimeout)
        assert "is not known" in str(error)
        assert "postmigrate" in str(error)
        assert f"kept whole in {room / 'vm.incomplete'}" in str(error)
    assert [path.name for path in room.iterdir()] == ["vm.incomplete"]
    with Snapshot.open(room / "vm.incomplete") as snapshot:
        snapshot.verify()


def test_source_that_fails_while_it_is_told(room: Path):
    """It runs its guest again: its ERROR comes instead of its leaving."""
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer, kit.dial(end.uri) as second:
        send_guest(peer, second)
        assert listen(second) == Shut(0).encode()
        peer.send(ControlMessage(ControlType.ERROR))
        peer.close()
        error = end.fail(PeerGone, "failed or was cancelled while it was told")
        assert "is not known" in str(error)
    assert [path.name for path in room.iterdir()] == ["vm.incomplete"]


@pytest.mark.parametrize("step", ["in the last phase", "RAM handed over", "device state sent"])
def test_source_that_leaves_before_the_last_word_keeps_its_guest(room: Path, step: str):
    """Without a return path its leaving at the end is how it completes."""
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer, kit.dial(end.uri) as second:
        steps = send_guest(peer, second, "in the last phase")
        if step != "in the last phase":
            kit.until("RAM handed over", steps)
        if step == "device state sent":
            # All but the description: a machine may suppress that.
            peer.stream(kit.SECTION_BREAK + snapshot_kit.STATE)
            peer.expect(ControlType.READY)
        peer.close()
        error = end.fail(PeerGone)
        assert AT_SOURCE in str(error)
    assert not list(room.iterdir())


def test_failure_at_the_very_end_is_said_and_leaves_the_guest_to_its_source(room: Path):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer, kit.dial(end.uri) as second:
        steps = send_guest(peer, second, "RAM handed over")
        (room / "vm").mkdir()
        second.ready()
        kit.until("device state sent", steps)
        assert second.expect(ControlType.QEMU_FILE) == Shut(1).encode()
        error = end.fail(SnapshotError, "came into existence")
        assert AT_SOURCE in str(error)
    assert [path.name for path in room.iterdir()] == ["vm"]
    assert not list((room / "vm").iterdir())


def test_door_closes_with_the_first_byte_of_the_stream(room: Path):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        peer.stream(snapshot_kit.HEAD)
        peer.expect(ControlType.READY)
        with pytest.raises(PeerGone, match="nobody listens"), kit.dial(end.uri):
            pytest.fail("it was accepted")


def test_door_is_for_one(room: Path):
    with (
        kit.incoming(room / "vm") as end,
        kit.dial(end.uri),
        kit.dial(end.uri),
        pytest.raises(PeerGone, match="nobody listens"),
        kit.dial(end.uri),
    ):
        pytest.fail("it was accepted")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queue pairs that exist on the device whenever a client is rejected."""
    counts: list[int] = []
    turn_away = EventChannel.turn_away

    def count(self: EventChannel, request: Any, reason: bytes = b"") -> None:
        counts.append(kit.resources()["qp"])
        turn_away(self, request, reason)

    monkeypatch.setattr(EventChannel, "turn_away", count)
    return counts


def test_second_connection_from_elsewhere_is_rejected(room: Path, made: list[int]):
    with kit.incoming(room / "vm", host="[::]") as end:
        port = end.uri.rpartition(":")[2]
        with kit.dial(f"rdma:{kit.device()[1]}:{port}") as peer:
            before = kit.resources()["qp"]
            with (
                pytest.raises(PeerGone, match="from another host is under way"),
                kit.dial(f"rdma:[{kit.ipv6_address()}]:{port}"),
            ):
                pytest.fail("it was accepted")
            assert made == [before + 1], "there was another queue pair than the client's own"
            # It has cost the migration nothing, and the door is still open to its source.
            with kit.dial(f"rdma:{kit.device()[1]}:{port}") as second:
                send_guest(peer, second)
                assert listen(second) == Shut(0).encode()
                peer.close()
                end.succeed()


def test_second_connection_of_our_own_source_carries_its_nonce(room: Path, made: list[int]):
    def asked(nonce: int) -> bytes:
        return PrivateData(1, FLAG_PIN_ALL, Extension(FEATURE_FINAL_ACK, nonce)).encode()

    with kit.incoming(room / "vm") as end, kit.dial(end.uri, asked(1)):
        before = kit.resources()["qp"]
        for other in (asked(2), kit.PLAIN):
            with (
                pytest.raises(PeerGone, match="another migration is under way"),
                kit.dial(end.uri, other),
            ):
                pytest.fail("it was accepted")
        assert made == [before + 1] * 2
        with kit.dial(end.uri, asked(1)) as second:
            granted = PrivateData.decode(second.endpoint.private_data)
            assert granted.extension == Extension(FEATURE_FINAL_ACK, 1)


@pytest.mark.parametrize("version", [0, 2])
def test_second_connection_of_another_version_is_rejected(room: Path, version: int):
    with (
        kit.incoming(room / "vm") as end,
        kit.dial(end.uri),
        pytest.raises(PeerGone, match=rf"version is {version}, allowed is 1"),
        kit.dial(end.uri, version.to_bytes(4, "big") + bytes(4)),
    ):
        pytest.fail("it was accepted")


def test_stream_that_speaks_of_a_return_path_that_was_not_opened(room: Path):
    """QEMU 7.2 with return-path alone. It fails there; the reason is said here."""
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        kit.until("device state sent", kit.act_as_source(peer, HEAD))
        peer.close()
        end.succeed()
    assert any("opened none" in getattr(event, "message", "") for event in end.events)


# ---- a source of ours ----


def receive_guest(listener: kit.RawListener) -> tuple[kit.Peer, kit.Peer]:
    """As a destination with a return path, behave well until everything has been received."""
    peer = listener.accept(return_path=True)
    # Before any byte of the stream, which comes only when it is asked for.
    second = listener.second()
    # Unasked, as QEMU does it.
    say(second, Pong(1).encode())
    kit.until("all received", kit.act_as_destination(peer))
    return peer, second


def test_source_opens_the_return_path_first_and_believes_what_it_hears(kept: Path):
    def work() -> None:
        peer, second = receive_guest(listener)
        second.expect(ControlType.READY)
        second.expect(ControlType.READY)
        say(second, Shut(0).encode())
        peer.close()

    with kit.RawListener() as listener:
        worker = kit.Worker(work)
        with kit.outgoing(kept, listener.uri, return_path=True) as end:
            end.succeed()
            worker.result()
    assert end.events[-1].confirmed == (
        "the destination said on the return path that it has loaded everything"
    )


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        (Pong(1).encode() + Shut(1).encode(), r"says on the return path .* \(status 1\)"),
        (Shut(5).encode(), r"\(status 5\)"),
        (Shut(0).encode(), "PONG 1 was due"),
        (Pong(2).encode(), "PONG 1 was due"),
        (Pong(1).encode() * 2, "SHUT was due"),
        (b"\0\4\0\x0c" + bytes(12), "REQ_PAGES, which belongs to postcopy"),
        (b"\0\1\xff\xff", "65535 bytes, allowed are 4"),
        (b"\xff\xff\0\0", "type 65535, which is unknown"),
    ],
)
def test_word_that_is_none(kept: Path, frames: bytes, match: str):
    def work() -> None:
        peer = listener.accept(return_path=True)
        second = listener.second()
        say(second, frames)
        kit.until("all received", kit.act_as_destination(peer))

    with kit.RawListener() as listener:
        worker = kit.Worker(work)
        with kit.outgoing(kept, listener.uri, return_path=True) as end:
            said_so = "status" in match
            error = end.fail(MigrationError if said_so else RemoteProtocolError, match)
            assert "snapshot" in error.owner
            worker.result()


@pytest.mark.parametrize("kind", [ControlType.READY, ControlType.REGISTER_FINISHED])
def test_control_message_on_the_return_path(kept: Path, kind: ControlType):
    def work() -> None:
        peer = listener.accept(return_path=True)
        second = listener.second()
        second.send(ControlMessage(kind))
        kit.until("all received", kit.act_as_destination(peer))

    with kit.RawListener() as listener:
        worker = kit.Worker(work)
        with kit.outgoing(kept, listener.uri, return_path=True) as end:
            end.fail(RemoteProtocolError, f"sent {kind.name} where QEMU_FILE was due")
            worker.result()


def test_destination_that_never_says_its_last_word(kept: Path):
    with kit.RawListener() as listener:
        worker = kit.Worker(lambda: receive_guest(listener))
        with kit.outgoing(kept, listener.uri, return_path=True, stall_seconds=1) as end:
            end.fail(MigrationTimeout, "word on the return path")
            worker.result()


def test_destination_that_leaves_without_its_last_word(kept: Path):
    def work() -> None:
        peer, second = receive_guest(listener)
        second.close()
        peer.close()

    with kit.RawListener() as listener:
        worker = kit.Worker(work)
        with kit.outgoing(kept, listener.uri, return_path=True) as end:
            end.fail(PeerGone, "word on the return path")
            worker.result()


def test_destination_that_takes_no_second_connection(kept: Path):
    """It never answers, as a QEMU that offers none; the limit is 5 s."""
    with kit.RawListener() as listener:
        worker = kit.Worker(listener.accept)
        with kit.outgoing(kept, listener.uri, return_path=True) as end:
            error = end.fail(PeerGone, "took no second connection")
            assert "switch return-path on at the destination" in str(error)
            worker.result()
