# SPDX-License-Identifier: Apache-2.0
"""checkpoint, restore and migrate over RDMA; what they do beside that is in tests/manager."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import harness
import pytest
from harness import device_address, free_port
from manager_kit import (
    SLOW,
    assert_nothing_left,
    assert_proves_its_ram,
    assert_runs_on,
    assert_whole,
    check_keys,
    driven,
    settings,
    socket_of,
    waiting,
)
from support import Command, prompt, rdma_uri

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]

PINNED = pytest.mark.parametrize("pinned", ["--rdma-pin-all", ""], ids=["pin-all", "dynamic"])


@PINNED
def test_guest_goes_through_a_checkpoint_into_another_qemu(tmp_path: Path, pinned: str):
    snapshot = tmp_path / "vm"
    with driven(tmp_path) as source:
        before = settings(source)
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), snapshot, "--rdma-device",
            device_address()[0], "--json", *pinned.split(),
        ) as command:  # fmt: skip
            command.succeed()
            assert check_keys(command)[-1] == "guest"
            connected = command.event("connected")
            assert connected["device"] == device_address()[0]
            assert connected["pin_all"] is bool(pinned)
            assert "return path" in command.event("completed")["confirmed"]
        assert_runs_on(source)
        assert settings(source) == before
    assert_whole(snapshot)
    with waiting(tmp_path) as destination:
        before = settings(destination)
        with Command(
            "restore", snapshot, "--qmp", socket_of(destination), "--uri", rdma_uri(free_port()),
            "--json", *pinned.split(),
        ) as command:  # fmt: skip
            command.succeed()
            assert check_keys(command)[-1] == "guest"
            assert command.event("connected")["pin_all"] is bool(pinned)
        assert settings(destination) == before
        assert_proves_its_ram(destination)


@PINNED
def test_guest_goes_from_one_qemu_to_another(tmp_path: Path, pinned: str):
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        before = settings(source), settings(destination)
        source.wait_heartbeat(2)
        with Command(
            "migrate", "--qmp", socket_of(source), "--to-qmp", socket_of(destination),
            rdma_uri(free_port()), "--json", *pinned.split(),
        ) as command:  # fmt: skip
            command.succeed()
            assert command.event("guest")["status"] == "running"
            assert command.event("migrated")["uri"].startswith("rdma:")
        assert source.status() == "postmigrate"
        assert (settings(source), settings(destination)) == before
        assert_proves_its_ram(destination)


def test_destination_that_offers_no_return_path_is_asked_for_none(tmp_path: Path):
    """Where QEMU may not use userfaultfd() it has none, and nobody answers who opens one."""
    snapshot = tmp_path / "vm"
    script = Path(harness.__file__).with_name("no_userfaultfd.py")
    confined = [sys.executable, str(script)]
    with driven(tmp_path) as source:
        source.wait_heartbeat(2)
        with waiting(tmp_path, "first", prefix=confined) as destination:
            with Command(
                "migrate", "--qmp", socket_of(source), "--to-qmp", socket_of(destination),
                rdma_uri(free_port()), "--json", "--rdma-pin-all",
            ) as command:  # fmt: skip
                command.succeed()
                assert "there is no return path" in command.event("warning")["message"]
            assert source.status() == "postmigrate"
            destination.wait_heartbeat(3)
            with Command("checkpoint", "--qmp", socket_of(destination), snapshot) as command:
                command.succeed()
    with waiting(tmp_path, "second", prefix=confined) as destination:
        with Command(
            "restore", snapshot, "--qmp", socket_of(destination), "--uri", rdma_uri(free_port()),
            "--json",
        ) as command:  # fmt: skip
            command.succeed()
            assert "there is no return path" in command.event("warning")["message"]
        assert_proves_its_ram(destination)


def test_wrong_machine_is_told_in_qemu_s_words(tmp_path: Path):
    with driven(tmp_path) as source, waiting(tmp_path, machine="q35") as destination:
        before = settings(source)
        source.wait_heartbeat(2)
        with Command(
            "migrate", "--qmp", socket_of(source), "--to-qmp", socket_of(destination),
            rdma_uri(free_port()),
        ) as command:  # fmt: skip
            said = command.fail(1)
            assert "Machine type received is 'pc-i440fx" in said
            assert "the guest runs on" in said
        assert settings(source) == before
        assert_runs_on(source)


def test_checkpoint_cancelled_in_the_middle(tmp_path: Path):
    with driven(tmp_path) as source:
        before = settings(source)
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--uri", rdma_uri(0),
            "--json", "--max-bandwidth", SLOW,
        ) as command:  # fmt: skip
            command.wait_event("qemu", status="active", transferred=1)
            command.signal(signal.SIGINT)
            assert "the guest runs on" in command.fail(5, prompt())
        assert_runs_on(source)
        assert settings(source) == before
    assert_nothing_left(tmp_path)


def test_destination_that_is_killed_leaves_the_guest_at_the_source(tmp_path: Path):
    with driven(tmp_path) as source, waiting(tmp_path) as destination:
        before = settings(source)
        source.wait_heartbeat(2)
        with Command(
            "migrate", "--qmp", socket_of(source), "--to-qmp", socket_of(destination),
            rdma_uri(free_port()), "--json", "--max-bandwidth", SLOW,
        ) as command:  # fmt: skip
            command.wait_event("qemu", status="active", transferred=1)
            destination.signal(signal.SIGKILL)
            assert "the guest runs on" in command.fail(1)
        assert settings(source) == before
        assert_runs_on(source)


def test_source_that_is_killed_leaves_nothing(tmp_path: Path):
    with driven(tmp_path) as source, Command(
        "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--uri", rdma_uri(0),
        "--json", "--max-bandwidth", SLOW,
    ) as command:  # fmt: skip
        command.wait_event("qemu", status="active", transferred=1)
        source.signal(signal.SIGKILL)
        assert "the machine with it" in command.fail(1)
    assert_nothing_left(tmp_path)
