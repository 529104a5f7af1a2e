# SPDX-License-Identifier: Apache-2.0
"""Both ends over iWARP: RDMA over TCP, by the kernel's software provider.

Its rules are not InfiniBand's. The provider completes the handshake and moves the queue pair,
private data is not padded, a request completes when TCP has taken it and not when it has arrived,
and what is wrong with a write is told by ending the connection.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rdma_command
import rdma_kit as kit

from rdma_mig.errors import (
    HostError,
    MigrationCancelled,
    MigrationError,
    MigrationTimeout,
    PeerGone,
)
from rdma_mig.migration.events import Completed, Warned
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.wire.control import ControlType, RamBlockRecord

pytestmark = [pytest.mark.rdma, pytest.mark.root]

DEVICE, INTERFACE, ADDRESS = "rmigsiw", "rmigdummy", "10.99.7.1"
COMMAND = str(Path(sys.executable).with_name("rdma-migrate"))
SCRIPT = Path(__file__).with_name("rdma_peer.py")
NOTICED = 15.0
# Probes that are answered are sent this often, and a silent peer is given up after 2.5 s.
EAGER = EndpointOptions(probe_seconds=0.5, silence_seconds=2.0)


def command(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, timeout=kit.patience(20))


# Removes what the fixture has made, when the process that this pipe leads from has ended. Not
# before: librdmacm keeps each device open that it has used, and the kernel waits for that.
UNDO = f"read -r _; rdma link del {DEVICE}; ip link del {INTERFACE}"
UNDOING: list[subprocess.Popen[bytes]] = []


@pytest.fixture(scope="module", autouse=True)
def siw() -> Iterator[None]:
    """An iWARP device on an interface of its own."""
    # Built in, it is no module; where it is neither, the next command says so.
    subprocess.run(["modprobe", "siw"], check=False, capture_output=True)
    UNDOING.append(
        subprocess.Popen(["sh", "-c", UNDO], stdin=subprocess.PIPE, start_new_session=True)
    )
    command("ip", "link", "add", INTERFACE, "mtu", "9000", "type", "dummy")
    command("ip", "addr", "add", f"{ADDRESS}/24", "dev", INTERFACE)
    command("ip", "link", "set", INTERFACE, "up")
    command("rdma", "link", "add", DEVICE, "type", "siw", "netdev", INTERFACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "device", lambda: (DEVICE, ADDRESS))
        yield


@pytest.fixture(autouse=True)
def _nothing_left(siw: None) -> Iterator[None]:
    before = {**kit.resources(), "ctx": 1}  # librdmacm's own, see above
    yield
    kit.settle(before)


# ---- whole migrations ----


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("pin_all", [True, False], ids=["pin-all", "dynamic"])
def test_whole_migration(room, kept, pin_all, connections):
    destination = subprocess.Popen(
        [COMMAND, "incoming", f"rdma:{ADDRESS}:0", "-o", room / "vm", "--json"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        uri = json.loads(destination.stdout.readline())["uri"]
        options = {"pin_all": pin_all, "endpoint": EAGER, "connections": connections}
        with kit.outgoing(kept, uri, **options) as source:
            source.succeed()
        output, _ = destination.communicate(timeout=kit.patience(20))
    finally:
        destination.kill()
        destination.communicate()
    assert destination.returncode == 0
    assert subprocess.run(["diff", "-r", kept, room / "vm"], check=False).returncode == 0
    events = [event.as_json() for event in source.events]
    events += [json.loads(line) for line in output.splitlines()]
    connected = [event for event in events if event["event"] == "connected"]
    assert len(connected) == 2
    for event in connected:
        assert event.pop("peer").startswith(f"{ADDRESS}:")
        assert event.pop("local").startswith(f"{ADDRESS}:")
        assert event == {
            "event": "connected", "device": DEVICE, "port": 1, "transport": "iWARP",
            "gid_index": None, "gid": None, "mtu": None, "pin_all": pin_all,
            "connections": connections,
        }  # fmt: skip
    done = next(event for event in source.events if isinstance(event, Completed))
    assert "acknowledged" in done.confirmed


@pytest.mark.parametrize(
    ("private_data", "said"),
    [(b"\0\0\0\2\0\0\0\1", "version is 2"), (b"\0\0\0\1", "4 bytes"), (b"", "0 bytes")],
)
def test_rejected_with_a_reason(room, private_data, said):
    with kit.incoming(room / "vm") as end:
        with (
            pytest.raises(PeerGone, match=rf"rejected the connection .*{said}"),
            kit.dial(end.uri, private_data),
        ):
            pytest.fail("it was accepted")
        assert not end.migration.wait(0.5), "a stranger ended it"
        (line,) = [event.message for event in end.events if isinstance(event, Warned)]
        assert said in line


def test_private_data_is_not_padded():
    with kit.RawListener() as listener:
        accepted = kit.Worker(listener.accept)
        with kit.dial(listener.uri) as peer:
            accepted.result()
            assert listener.asked == kit.PLAIN
            assert peer.endpoint.private_data == kit.PLAIN


def test_nobody_listens(kept):
    with kit.outgoing(kept, f"rdma:{ADDRESS}:1") as source:
        source.fail(PeerGone, "nobody listens")


def test_gids_cannot_be_chosen(kept):
    options = EndpointOptions(device=DEVICE, gid_index=0)
    with kit.outgoing(kept, f"rdma:{ADDRESS}:1", endpoint=options) as source:
        source.fail(HostError, "iWARP has no GIDs")


# ---- a host that does not answer ----

# TCP connects within one call there, which the kernel gives up after two minutes.
PORT = 4444


@pytest.fixture
def silent() -> str:
    """Where nothing comes back from: a neighbour who is known, on an interface that drops all."""
    host = "10.99.7.9"
    command(
        "ip", "neigh", "replace", host, "lladdr", "02:00:00:00:00:09", "dev", INTERFACE,
        "nud", "permanent",
    )  # fmt: skip
    return f"rdma:{host}:{PORT}"


@pytest.fixture
def impatient_tcp() -> Iterator[None]:
    """Let the kernel give up after some 3 s, and wait for what is given back then."""
    retries = Path("/proc/sys/net/ipv4/tcp_syn_retries")
    usual = retries.read_text()
    before = {**kit.resources(), "ctx": 1}
    retries.write_text("1")
    try:
        yield
        kit.settle(before)
    finally:
        retries.write_text(usual)


@pytest.mark.usefixtures("impatient_tcp")
def test_host_that_does_not_answer_is_given_up_in_time(kept, silent):
    options = EndpointOptions(connect_seconds=1.0)
    began = time.monotonic()
    with kit.outgoing(kept, silent, endpoint=options) as source:
        source.fail(MigrationTimeout, "no answer within 1 s while connecting")
        assert time.monotonic() - began < kit.patience(2)


@pytest.mark.usefixtures("impatient_tcp")
def test_cancelled_while_tcp_connects(kept, silent):
    with kit.outgoing(kept, silent) as source:
        until_it_connects()
        began = time.monotonic()
        source.migration.cancel()
        source.fail(MigrationCancelled, "cancelled while connecting")
        assert time.monotonic() - began < kit.patience(0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_tcp_connects(kept, silent, number):
    with rdma_command.started("outgoing", kept, silent) as process:
        until_it_connects()
        line = rdma_command.interrupted(process, number)
    assert "cancelled while connecting" in line
    assert f"the snapshot in {kept} is unchanged" in line


def until_it_connects() -> None:
    end = time.monotonic() + kit.patience(20)
    # The other end's address and port, and the state SYN_SENT (proc(5), /proc/net/tcp).
    while f":{PORT:04X} 02 " not in Path("/proc/net/tcp").read_text():
        assert time.monotonic() < end, "nobody connects"
        time.sleep(0.02)


# ---- cancelled ----


@pytest.mark.parametrize("step", ["connected", "RAM written"])
def test_cancelled_at_the_source(kept, step):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        kit.until(step, kit.act_as_destination(listener.accept()))
        time.sleep(0.2)
        began = time.monotonic()
        threading.Timer(0, end.migration.cancel).start()
        with pytest.raises(MigrationCancelled):
            assert end.migration.wait(kit.patience(10))
        assert time.monotonic() - began < kit.patience(1.5)


def receive_without_end(peer: kit.Peer) -> None:
    while True:
        peer.receive()


@pytest.mark.parametrize("step", ["connected", "RAM written"])
def test_cancelled_at_the_destination(room, step):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        kit.until(step, kit.act_as_source(peer))
        time.sleep(0.2)
        end.migration.cancel()
        with pytest.raises(MigrationCancelled):
            assert end.migration.wait(kit.patience(10))
        with pytest.raises(PeerGone):
            receive_without_end(peer)
    assert list(room.iterdir()) == []


# ---- peers that are gone ----


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    peer = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield peer
    finally:
        peer.kill()
        peer.communicate()


def test_killed_source_is_noticed(room):
    with kit.incoming(room / "vm") as end, process("source", end.uri, "in the last phase") as peer:
        assert peer.stdout.readline() == "in the last phase\n"
        began = time.monotonic()
        peer.kill()
        end.fail(PeerGone, "closed the connection")
        assert time.monotonic() - began < NOTICED
    assert list(room.iterdir()) == []


def test_killed_destination_is_noticed(kept):
    with (
        process("destination", ADDRESS, "in setup") as peer,
        kit.outgoing(kept, peer.stdout.readline().strip()) as end,
    ):
        assert peer.stdout.readline() == "in setup\n"
        began = time.monotonic()
        peer.kill()
        assert "is unchanged" in end.fail(MigrationError, "closed the connection").owner
        assert time.monotonic() - began < NOTICED


@contextlib.contextmanager
def cut_off() -> Iterator[None]:
    """Nothing reaches anybody: what this host sends to itself goes by the loopback interface."""
    command("tc", "qdisc", "add", "dev", "lo", "root", "netem", "loss", "100%")
    try:
        yield
    finally:
        command("tc", "qdisc", "del", "dev", "lo", "root")


def test_host_that_answers_no_more_is_noticed(room):
    """TCP alone would take a quarter of an hour."""
    with kit.incoming(room / "vm", endpoint=EAGER) as end, kit.dial(end.uri) as peer:
        kit.until("in the last phase", kit.act_as_source(peer))
        peer.expect(ControlType.READY)
        assert not end.migration.wait(4), "a peer that answers probes was given up"
        with cut_off():
            began = time.monotonic()
            end.fail(PeerGone, "has not answered", seconds=30)
            assert time.monotonic() - began < 2.5 + kit.patience(1)


def write_without_end(peer: kit.Peer, record: RamBlockRecord) -> None:
    while True:
        peer.write(record.host_address, record.rkey, bytes(kit.MIB))


def test_host_that_takes_no_more_is_noticed_by_a_writing_source():
    """TCP keeps what it is given: the writes neither complete nor fail."""
    with kit.RawListener() as listener:
        accepted = kit.Worker(listener.accept)
        with kit.dial(listener.uri, options=EAGER) as peer:
            accepted.result()
            kit.offer(listener.peer)
            record = listener.peer.records[0]
            with cut_off():
                began = time.monotonic()
                with pytest.raises(PeerGone, match="has not answered"):
                    write_without_end(peer, record)
            assert time.monotonic() - began < 2.5 + kit.patience(2)


# ---- what a peer may not do ----


def test_write_after_the_keys_were_withdrawn_fails(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        kit.until("RAM handed over", kit.act_as_source(peer))
        peer.expect(ControlType.READY)
        record = peer.records[0]
        # The write itself has completed when it was handed to TCP.
        peer.write(record.host_address, record.rkey, b"too late")
        with pytest.raises(PeerGone, match="closed the connection"):
            peer.receive()
        peer.close()
        end.fail(PeerGone, "closed the connection")
    assert b"too late" not in (room / "vm.incomplete" / "ram" / "0.raw").read_bytes()
