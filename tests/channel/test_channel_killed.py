# SPDX-License-Identifier: Apache-2.0
"""`incoming` is killed when all has come from a QEMU that asked nobody before it let go."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from channel_kit import GUEST, Stored, assert_runs_on, assert_same_memory
from harness import Qemu, free_port
from harness.output import check_output
from killed import from_qemu, kill, left_behind, rdma_migrate, stopped_at
from support import (
    Command,
    Incoming,
    wait_for,
)

from rdma_mig.migration.events import MigrationEvent, Warned
from rdma_mig.migration.receive import SnapshotDestination
from rdma_mig.migration.state import Migration
from rdma_mig.migration.uris import qemu_start_incoming_migration

# All has arrived, and is in memory; RAM is on disk, and the directory whole without its name.
RECEIVED = {"before": "rdma_mig.snapshot.writer:SnapshotWriter.write_ram"}
WRITTEN = {"before": "rdma_mig.snapshot._fs:rename_noreplace"}


@pytest.mark.parametrize("at", [RECEIVED, WRITTEN], ids=["received", "written"])
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_machine_is_kept_whole_and_runs_on(tmp_path: Path, scheme: str, at: dict[str, str]):
    kept = tmp_path / "kept"
    listen = {"tcp": "tcp:127.0.0.1:0", "unix": f"unix:{tmp_path}/socket"}[scheme]
    with Qemu(guest=GUEST, name="source") as source:
        source.wait_heartbeat(2)
        with stopped_at(at, from_qemu(source), kept, "after", uri=listen) as incoming:
            source.wait_migration()
            assert source.status() == "postmigrate"
            kill(incoming)
            left = left_behind(kept)
            said = incoming.stderr
        assert left == tmp_path / "kept.incomplete"
        assert f"kept whole in {left}" in said
        memory = bytes(source.memory()[:])
    found = rdma_migrate("recover", "--json", left)
    assert found.returncode == 0, found.stderr
    assert check_output("recover", json.loads(found.stdout)) == {"path": str(kept)}
    assert_same_memory(kept, memory)
    entry = f"tcp:127.0.0.1:{free_port()}"
    with Qemu(guest=GUEST, name="destination", incoming=entry) as destination:
        with Command("outgoing", kept, entry) as command:
            command.succeed()
        assert_runs_on(destination)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("sync", "scheme", "wanted"),
    [("after", "unix", 1), ("before", "unix", 0), ("after", "file", 0)],
)
def test_custodian_is_there_from_the_start_where_it_is_of_use(
    tmp_path: Path, sync: str, scheme: str, wanted: int
):
    os.mkfifo(tmp_path / "file")
    uri = f"{scheme}:{tmp_path / scheme}"
    with Incoming(tmp_path / "kept", "--sync", sync, uri=uri) as incoming:
        assert incoming.uri
        found = children(incoming.process.pid)
        assert len(found) == wanted
        incoming.signal(signal.SIGTERM)
        incoming.fail(5, 10)
        for pid in found:
            assert not Path(f"/proc/{pid}").exists()
    assert not list(tmp_path.glob("kept*"))


def test_killed_while_it_listens_leaves_no_process(tmp_path: Path):
    with Incoming(tmp_path / "kept", uri=f"unix:{tmp_path}/socket") as incoming:
        assert incoming.uri
        (custodian,) = children(incoming.process.pid)
        kill(incoming)
        wait_for("its end", lambda: not Path(f"/proc/{custodian}/exe").exists(), 20)
        assert incoming.stderr == ""
        assert left_behind(tmp_path / "kept").name == f"kept.partial-{incoming.process.pid}"


@pytest.mark.parametrize("python", ["/nonexistent/python", "/bin/false"])
def test_migration_goes_on_without_one(
    tmp_path: Path, stored: Stored, python: str, monkeypatch: pytest.MonkeyPatch
):
    told: list[MigrationEvent] = []
    monkeypatch.setattr(sys, "executable", python)
    destination = SnapshotDestination(tmp_path / "kept", custodian=True)
    with contextlib.closing(destination), Migration(told.append) as migration:
        qemu_start_incoming_migration(
            f"exec:cat {stored.stream}", migration=migration, process=destination.process
        )
        migration.wait()
    (warning,) = [event for event in told if isinstance(event, Warned)]
    assert warning.message.startswith("the process that guards guest RAM ")
    assert "`cont` at the source resumes its guest" in warning.message
    assert_same_memory(tmp_path / "kept", stored.memory)
