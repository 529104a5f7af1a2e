# SPDX-License-Identifier: Apache-2.0
"""rdma-migrate migrate: a running guest from one real QEMU into another."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import Qemu, free_port
from manager_kit import (
    SLOW,
    assert_proves_its_ram,
    assert_runs_on,
    check_keys,
    driven,
    settings,
    socket_of,
    waiting,
)
from support import Command, prompt


def migrate(source: Qemu, destination: Qemu, *options: str) -> Command:
    return Command(
        "migrate", "--qmp", socket_of(source), "--to-qmp", socket_of(destination), "--json",
        *options,
    )  # fmt: skip


@pytest.mark.parametrize("uri", ["", "tcp:127.0.0.1:0", "tcp:127.0.0.1:PORT", "unix:DIR/meet"])
def test_guest_goes_from_one_qemu_to_another(tmp_path: Path, uri: str):
    uri = uri.replace("PORT", str(free_port())).replace("DIR", str(tmp_path))
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        before = settings(source), settings(destination)
        source.wait_heartbeat(2)
        with migrate(source, destination, *uri.split()) as command:
            command.succeed()
            names = check_keys(command)
            assert names[-2:] == ["migrated", "guest"]
            assert command.event("guest")["status"] == "running"
            migrated = command.event("migrated")
            assert migrated["bytes"] > 4 << 20
            assert 0 < migrated["downtime_seconds"] <= migrated["total_seconds"]
            ends = {event["end"] for event in command.events() if event["event"] == "qemu"}
            assert ends == {"source", "destination"}
        assert source.status() == "postmigrate"
        assert (settings(source), settings(destination)) == before
        assert_proves_its_ram(destination)


def test_guest_is_left_stopped_where_that_was_asked_for(tmp_path: Path):
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        source.wait_heartbeat(2)
        with migrate(source, destination, "--stop") as command:
            command.succeed()
        assert destination.status() == "paused"
        destination.cont()
        assert_proves_its_ram(destination)


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_wrong_machine_leaves_the_guest_as_it_was(tmp_path: Path, paused: bool):
    with driven(tmp_path) as source, waiting(tmp_path, machine="q35") as destination:
        source.wait_heartbeat(2)
        if paused:
            source.stop()
        before = settings(source)
        with migrate(source, destination) as command:
            said = command.fail(1)
            assert "Machine type received is 'pc-i440fx" in said
            assert ("the guest rests" if paused else "the guest runs on") in said
        assert settings(source) == before
        if paused:
            assert source.status() in ("paused", "postmigrate")
            source.cont()
        assert_runs_on(source)


def in_between(source: Qemu, destination: Qemu) -> Command:
    command = migrate(source, destination, "--max-bandwidth", SLOW)
    command.wait_event("qemu", status="active", transferred=1)
    return command


def test_destination_that_is_killed_leaves_the_guest_at_the_source(tmp_path: Path):
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        before = settings(source)
        source.wait_heartbeat(2)
        with in_between(source, destination) as command:
            destination.signal(signal.SIGKILL)
            assert f"the guest runs on in the QEMU at {socket_of(source)}" in command.fail(1)
        assert settings(source) == before
        assert_runs_on(source)


def test_source_that_is_killed_is_told(tmp_path: Path):
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        source.wait_heartbeat(2)
        with in_between(source, destination) as command:
            source.signal(signal.SIGKILL)
            said = command.fail(1)
            assert f"the QEMU at {socket_of(source)} is gone" in said
            assert "the machine with it" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cancelled_in_the_middle_the_guest_runs_on(tmp_path: Path, number: signal.Signals):
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        before = settings(source)
        source.wait_heartbeat(2)
        with in_between(source, destination) as command:
            command.signal(number)
            assert "the guest runs on" in command.fail(5, prompt())
        assert source.query_migrate()["status"] == "cancelled"
        assert settings(source) == before
        assert_runs_on(source)


def test_timeout(tmp_path: Path):
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        source.wait_heartbeat(2)
        with migrate(source, destination, "--max-bandwidth", SLOW, "--timeout", "0.5") as command:
            assert "within 0.5 s" in command.fail(5)
        assert_runs_on(source)


def test_destination_that_does_not_wait(tmp_path: Path):
    with driven(tmp_path) as source, driven(tmp_path, "destination") as destination:
        before = settings(source)
        with migrate(source, destination) as command:
            assert command.fail(2).endswith("-incoming defer")
        assert settings(source) == before
        assert source.status() == destination.status() == "running"


def test_port_that_the_destination_cannot_have(tmp_path: Path):
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        with migrate(source, destination, "tcp:192.0.2.77:4444") as command:
            said = command.fail(1)
            assert "Cannot assign requested address" in said
            assert "the guest runs on" in said
        # Both are as before.
        with migrate(source, destination) as command:
            command.succeed()


def test_one_socket_for_both(tmp_path: Path):
    with Command("migrate", "--qmp", "x", "--to-qmp", "x") as command:
        command.fail(2)
