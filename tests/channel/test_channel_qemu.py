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
