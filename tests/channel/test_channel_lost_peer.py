# SPDX-License-Identifier: Apache-2.0
"""A peer that is killed, and migrations that are cancelled, in the middle and without RDMA."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from channel_kit import GUEST, Stored, leave
from harness import Qemu, fill_random, free_port
from support import MIB, Command, Incoming, assert_survives, slow_migration


@pytest.fixture(params=["tcp", "unix"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where `incoming` listens."""
    return {"tcp": "tcp:127.0.0.1:0", "unix": f"unix:{tmp_path}/socket"}[request.param]


@pytest.fixture(params=["tcp", "unix"])
def qemu_s(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a QEMU listens."""
    return {"tcp": f"tcp:127.0.0.1:{free_port()}", "unix": f"unix:{tmp_path}/qemu"}[request.param]


def test_source_that_is_killed_is_noticed(tmp_path: Path, listening: str):
    with (
        Qemu(guest=GUEST, name="source") as source,
        Incoming(tmp_path / "kept", uri=listening) as incoming,
    ):
        source.wait_heartbeat(2)
        slow_migration(source, incoming)
        source.signal(signal.SIGKILL)
        source.wait_exit()
        line = incoming.fail(1, 10)
    assert "ended the stream" in line or "broke off" in line
    assert list(tmp_path.iterdir()) == []


def test_destination_that_is_killed_leaves_the_guest_to_its_source(tmp_path: Path, listening: str):
    with (
        Qemu(guest=GUEST, name="source") as source,
        Incoming(tmp_path / "kept", uri=listening) as incoming,
    ):
        source.wait_heartbeat(2)
        slow_migration(source, incoming)
        incoming.signal(signal.SIGKILL)
        incoming.wait()
        assert_survives(source)
    # What it had begun is not under its final name.
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("who", ["source", "destination"])
def test_migration_that_is_cancelled_leaves_nothing(tmp_path: Path, listening: str, who: str):
    with (
        Qemu(guest=GUEST, name="source") as source,
        Incoming(tmp_path / "kept", uri=listening) as incoming,
    ):
        source.wait_heartbeat(2)
        slow_migration(source, incoming)
        if who == "source":
            source.qmp("migrate_cancel")
            assert "virtual machine is still the source's" in incoming.fail(1, 10)
            assert_survives(source, "cancelled")
        else:
            incoming.signal(signal.SIGTERM)
            assert "virtual machine is still the source's" in incoming.fail(5, 10)
            assert_survives(source)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A machine with more RAM in use than goes into the buffers of a socket."""
    with Qemu(guest=GUEST, name="source") as source:
        fill_random(source.memory_path, 1, 16 * MIB, 32 * MIB)
        source.wait_heartbeat(2)
        return leave(source, tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("end", ["destination killed", "source cancelled"])
def test_snapshot_on_its_way_stays_whole(large: Stored, qemu_s: str, end: str):
    with Qemu(guest=GUEST, name="destination", incoming=qemu_s) as destination:
        # It accepts by its kernel only, and reads nothing.
        destination.signal(signal.SIGSTOP)
        with Command("outgoing", large.directory, qemu_s, "--json") as command:
            command.wait_event("connected")
            time.sleep(0.5)
            if end == "destination killed":
                destination.signal(signal.SIGKILL)
                line = command.fail(1, 10)
            else:
                command.signal(signal.SIGTERM)
                line = command.fail(5, 10)
                destination.signal(signal.SIGKILL)
            assert command.event("failed")["step"] == "writing RAM"
        destination.wait_exit()
    assert f"the snapshot in {large.directory} is unchanged" in line
