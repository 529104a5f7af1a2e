# SPDX-License-Identifier: Apache-2.0
"""The header's functions for every channel with a real QEMU: its guest comes, and goes back.

They are given what the header gives them, and take the rest from the process's one migration.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from channel_kit import GUEST, Stored, assert_runs_on, assert_same_memory
from harness import Qemu, free_port

import rdma_mig.migration as header
from rdma_mig.errors import UsageError
from rdma_mig.migration.guests import SnapshotGuest

pytestmark = pytest.mark.usefixtures("current")


def wait() -> None:
    """Wait for the process's migration, which must end well."""
    migration = header.migrate_get_current().migration
    assert migration is not None
    assert migration.wait(60)
    assert header.migration_has_finished(header.migrate_get_current())


@pytest.mark.parametrize("scheme", ["tcp", "unix", "fd", "any"])
def test_guest_of_a_qemu_comes(tmp_path: Path, scheme: str) -> None:
    theirs, ours = socket.socketpair()
    with (
        theirs,
        Qemu(guest=GUEST, name="source") as source,
        SnapshotGuest(tmp_path / "kept") as guest,
    ):
        source.wait_heartbeat(2)
        header.migrate_set_guest(guest)
        match scheme:
            case "tcp":
                uri = header.tcp_start_incoming_migration("127.0.0.1:0")
            case "unix":
                uri = header.unix_start_incoming_migration(f"{tmp_path}/socket")
            case "fd":
                header.fd_start_incoming_migration(str(ours.detach()))
                source.give("socket", theirs.fileno())
                theirs.close()
                uri = "fd:socket"
            case _:
                uri = header.qemu_start_incoming_migration("tcp:127.0.0.1:0")
        source.migrate(uri)
        source.wait_migration()
        wait()
        assert source.status() == "postmigrate"
        assert_same_memory(tmp_path / "kept", bytes(source.memory()[:]))
    ours.close()


@pytest.mark.parametrize("scheme", ["exec", "file"])
def test_guest_comes_from_what_a_qemu_wrote(tmp_path: Path, stored: Stored, scheme: str) -> None:
    with SnapshotGuest(tmp_path / "kept") as guest:
        header.migrate_set_guest(guest)
        if scheme == "exec":
            header.exec_start_incoming_migration(f"cat {stored.stream}")
        else:
            header.file_start_incoming_migration(str(stored.stream))
        wait()
    assert_same_memory(tmp_path / "kept", stored.memory)


@pytest.mark.parametrize("scheme", ["tcp", "unix", "fd"])
def test_guest_goes_to_a_qemu(tmp_path: Path, stored: Stored, scheme: str) -> None:
    theirs, ours = socket.socketpair()
    address = {"tcp": f"127.0.0.1:{free_port()}", "unix": f"{tmp_path}/socket"}.get(scheme)
    with (
        theirs,
        Qemu(
            guest=GUEST, name="destination", incoming=f"{scheme}:{address}" if address else "defer"
        ) as destination,
        SnapshotGuest(stored.directory) as guest,
    ):
        header.migrate_set_guest(guest)
        current = header.migrate_get_current()
        match scheme:
            case "tcp":
                header.tcp_start_outgoing_migration(current, str(address))
            case "unix":
                header.unix_start_outgoing_migration(current, str(address))
            case _:
                destination.give("socket", theirs.fileno())
                theirs.close()
                destination.migrate_incoming("fd:socket")
                header.fd_start_outgoing_migration(current, str(ours.detach()))
        wait()
        assert_runs_on(destination)
    ours.close()


@pytest.mark.parametrize("scheme", ["exec", "file"])
def test_guest_goes_into_a_file_that_a_qemu_reads(
    tmp_path: Path, stored: Stored, scheme: str
) -> None:
    stream = tmp_path / "stream"
    with SnapshotGuest(stored.directory) as guest:
        header.migrate_set_guest(guest)
        if scheme == "exec":
            header.exec_start_outgoing_migration(header.migrate_get_current(), f"cat > {stream}")
        else:
            header.file_start_outgoing_migration(header.migrate_get_current(), str(stream))
        wait()
    with Qemu(guest=GUEST, name="destination", incoming=f"exec:cat {stream}") as destination:
        assert_runs_on(destination)


def test_nobody_to_load_into_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no guest"):
        header.unix_start_incoming_migration(f"{tmp_path}/socket")
    with pytest.raises(UsageError, match="there is no guest"):
        header.file_start_outgoing_migration(header.migrate_get_current(), f"{tmp_path}/stream")
    assert os.listdir(tmp_path) == []
