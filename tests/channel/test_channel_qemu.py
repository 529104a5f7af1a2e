# SPDX-License-Identifier: Apache-2.0
"""Every transport without RDMA, both ways, with a real QEMU whose guest runs meanwhile."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from channel_kit import GUEST, Stored, assert_runs_on, assert_same_memory, through_shell
from harness import Qemu, free_port
from support import Command, Incoming


@pytest.mark.parametrize("return_path", [False, True], ids=["", "return-path"])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_guest_leaves_a_qemu_over_a_socket(tmp_path: Path, scheme: str, return_path: bool):
    kept = tmp_path / "kept"
    uri = {"tcp": "tcp:127.0.0.1:0", "unix": f"unix:{tmp_path}/socket"}[scheme]
    with Qemu(guest=GUEST, name="source") as source, Incoming(kept, uri=uri) as incoming:
        source.set_capability("return-path", return_path)
        source.wait_heartbeat(2)
        source.migrate(incoming.uri)
        source.wait_migration()
        incoming.succeed()
        assert source.status() == "postmigrate"
        assert_same_memory(kept, bytes(source.memory()[:]))
        assert incoming.event("connected")["transport"] == scheme
        completed = incoming.event("completed")
        assert ("told on its return path" in completed["confirmed"]) is return_path
    assert not (tmp_path / "socket").exists()


def test_guest_leaves_a_qemu_over_a_pipe_that_was_there_already(tmp_path: Path):
    kept, fifo = tmp_path / "kept", tmp_path / "fifo"
    os.mkfifo(fifo)
    with Qemu(guest=GUEST, name="source") as source:
        source.wait_heartbeat(2)
        with Incoming(kept, uri="fd:7", prefix=through_shell(f"7<{fifo}")) as incoming:
            with fifo.open("wb") as pipe:
                source.give("pipe", pipe.fileno())
            assert incoming.uri == "fd:7"
            source.migrate("fd:pipe")
            source.wait_migration()
            incoming.succeed()
            assert_same_memory(kept, bytes(source.memory()[:]))


@pytest.mark.parametrize("scheme", ["exec", "file"])
def test_guest_that_left_a_qemu_into_a_file(tmp_path: Path, stored: Stored, scheme: str):
    uri = {"exec": f"exec:cat {stored.stream}", "file": f"file:{stored.stream}"}[scheme]
    with Incoming(tmp_path / "kept", uri=uri) as incoming:
        incoming.succeed()
    assert_same_memory(tmp_path / "kept", stored.memory)


@pytest.mark.parametrize("option", ["--return-path", "--no-return-path"])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_guest_enters_a_qemu_over_a_socket(
    tmp_path: Path, stored: Stored, scheme: str, option: str
):
    uri = {"tcp": f"tcp:127.0.0.1:{free_port()}", "unix": f"unix:{tmp_path}/socket"}[scheme]
    with (
        Qemu(guest=GUEST, name="destination", incoming=uri) as destination,
        Command("outgoing", stored.directory, uri, option, "--json") as outgoing,
    ):
        outgoing.succeed()
        assert_runs_on(destination)
        confirmed = outgoing.event("completed")["confirmed"]
    if option == "--return-path":
        assert confirmed == "the destination said on the return path that it has loaded everything"
    else:
        assert "nothing could prove" in confirmed


def test_guest_enters_a_qemu_over_a_socket_that_was_there_already(stored: Stored):
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        Qemu(guest=GUEST, name="destination", incoming="defer") as destination,
        Command(
            "outgoing", stored.directory, f"fd:{ours.fileno()}", "--json", pass_fds=[ours.fileno()]
        ) as outgoing,
    ):
        destination.give("socket", theirs.fileno())
        destination.migrate_incoming("fd:socket")
        outgoing.succeed()
        assert_runs_on(destination)
        assert "on the return path" in outgoing.event("completed")["confirmed"]


def test_guest_enters_a_qemu_over_a_pipe_that_was_there_already(tmp_path: Path, stored: Stored):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    prefix = through_shell(f"9<>{fifo}")
    with (
        Qemu(guest=GUEST, name="destination", incoming="fd:9", prefix=prefix) as destination,
        Command(
            "outgoing", stored.directory, "fd:7", "--json", prefix=through_shell(f"7>{fifo}")
        ) as outgoing,
    ):
        outgoing.succeed()
        assert_runs_on(destination)
        assert "nothing could prove" in outgoing.event("completed")["confirmed"]


@pytest.mark.parametrize("scheme", ["exec", "file"])
def test_guest_enters_a_qemu_through_a_file(tmp_path: Path, stored: Stored, scheme: str):
    stream = tmp_path / "stream"
    uri = {"exec": f"exec:cat > {stream}", "file": f"file:{stream}"}[scheme]
    with Command("outgoing", stored.directory, uri, "--json") as outgoing:
        outgoing.succeed()
        assert "nothing could prove" in outgoing.event("completed")["confirmed"]
    with Qemu(guest=GUEST, name="destination", incoming=f"exec:cat {stream}") as destination:
        assert_runs_on(destination)


def test_destination_that_lacks_a_device_is_no_success(tmp_path: Path, stored: Stored):
    uri = f"unix:{tmp_path}/socket"
    with (
        Qemu(guest=GUEST, name="destination", incoming=uri, memory_mib=32) as destination,
        Command("outgoing", stored.directory, uri) as outgoing,
    ):
        said = outgoing.fail(1)
        assert "is unchanged" in said
        destination.wait_exit()


def test_guest_comes_and_goes_over_ipv6(tmp_path: Path):
    kept, uri = tmp_path / "kept", f"tcp:[::1]:{free_port()}"
    with (
        Qemu(guest=GUEST, name="source") as source,
        Incoming(kept, uri="tcp:[::1]:0") as incoming,
    ):
        source.wait_heartbeat(2)
        assert incoming.uri.startswith("tcp:[::1]:")
        source.migrate(incoming.uri)
        source.wait_migration()
        incoming.succeed()
        assert incoming.event("connected")["peer"].startswith("[::1]:")
        assert_same_memory(kept, bytes(source.memory()[:]))
    with (
        Qemu(guest=GUEST, name="destination", incoming=uri) as destination,
        Command("outgoing", kept, uri) as outgoing,
    ):
        outgoing.succeed()
        assert_runs_on(destination)


def test_stream_at_an_offset_of_a_file(tmp_path: Path, stored: Stored):
    """What is there already stays: as of a file that has other things before the stream."""
    path = tmp_path / "file"
    path.write_bytes(b"before" * 1000)
    with Command("outgoing", stored.directory, f"file:{path},offset=4K") as outgoing:
        outgoing.succeed()
    assert path.read_bytes()[:4096] == (b"before" * 1000)[:4096]
    assert path.read_bytes()[4096:4100] == b"QEVM"
    with Incoming(tmp_path / "kept", uri=f"file:{path},offset=0x1000") as incoming:
        incoming.succeed()
    assert_same_memory(tmp_path / "kept", stored.memory)
    with Incoming(tmp_path / "not", uri=f"file:{path},offset=4095") as incoming:
        incoming.fail(4)
    uri = f"exec:tail -c +4097 {path}"
    with Qemu(guest=GUEST, name="destination", incoming=uri) as destination:
        assert_runs_on(destination)


def test_only_who_is_allowed_is_served(tmp_path: Path, stored: Stored):
    with Incoming(tmp_path / "kept", "--allow", "127.0.0.2", uri="tcp:127.0.0.1:0") as incoming:
        where = ("127.0.0.1", int(incoming.uri.rpartition(":")[2]))
        with socket.create_connection(where, 10) as other:
            assert other.recv(1) == b""
        warning = incoming.wait_event("warning")["message"]
        assert "turned 127.0.0.1 away: --allow does not name it" in warning
        with socket.create_connection(where, 10, source_address=("127.0.0.2", 0)) as allowed:
            allowed.sendall(stored.stream.read_bytes())
        incoming.succeed()
    assert_same_memory(tmp_path / "kept", stored.memory)
