# SPDX-License-Identifier: Apache-2.0
"""rdma-migrate checkpoint: a snapshot of a real QEMU, whose guest goes on as it was."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from manager_kit import (
    SLOW,
    assert_nothing_left,
    assert_runs_on,
    assert_whole,
    check_keys,
    driven,
    settings,
    socket_of,
    status_of,
)
from support import Command, prompt, wait_for

from rdma_mig.errors import MigrationCancelled, MigrationError
from rdma_mig.manager.checkpoint import undo
from rdma_mig.manager.monitor import Monitor
from rdma_mig.manager.process import QemuProcess
from rdma_mig.manager.qemu import Qemu
from rdma_mig.migration.state import Migration
from rdma_mig.snapshot import SnapshotWriter
from rdma_mig.waits import Cancel

IN_BETWEEN = ["--max-bandwidth", SLOW]


def uri_of(kind: str, directory: Path) -> list[str]:
    uris = {"private": [], "tcp": ["--uri", "tcp:127.0.0.1:0"]}
    return uris.get(kind, ["--uri", f"unix:{directory}/meet"])


@pytest.mark.parametrize("kind", ["private", "tcp", "unix"])
def test_guest_runs_on_behind_its_checkpoint(tmp_path: Path, kind: str):
    with driven(tmp_path) as source:
        source.set_capability("events", True)
        source.set_capability("xbzrle", True)
        source.set_parameter("max-bandwidth", 12345678)
        before = settings(source)
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--json",
            *uri_of(kind, tmp_path),
        ) as command:  # fmt: skip
            command.succeed()
            names = check_keys(command)
            assert names[-1] == "guest"
            assert {"connected", "qemu", "completed"} <= {*names}
            assert ("listening" in names) is (kind != "private")
            assert command.event("guest")["status"] == "running"
            assert {event["status"] for event in command.events() if event["event"] == "qemu"} >= {
                "completed"
            }
            # The source let go of its guest only when all was on disk.
            assert "return path" in command.event("completed")["confirmed"]
        assert_runs_on(source)
        assert settings(source) == before
        assert not (tmp_path / "meet").exists()
    assert_whole(tmp_path / "vm")
    recorded = json.loads((tmp_path / "vm" / "command.json").read_text())
    assert recorded["arguments"][: len(source.command)] == source.command
    assert (tmp_path / "vm" / "command.json").stat().st_mode & 0o777 == 0o600


def test_guest_stays_stopped_where_that_was_asked_for(tmp_path: Path):
    with driven(tmp_path) as source:
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--stop",
            "--no-record-command",
        ) as command:  # fmt: skip
            command.succeed()
        assert source.status() == "postmigrate"
        assert (tmp_path / "vm" / "ram" / "0.raw").read_bytes() == bytes(source.memory()[:])
        assert not (tmp_path / "vm" / "command.json").exists()
        # What it is for: it can be resumed.
        source.cont()
        assert_runs_on(source)


def test_guest_that_was_paused_stays_paused(tmp_path: Path):
    with driven(tmp_path) as source:
        source.wait_heartbeat(2)
        source.stop()
        memory = bytes(source.memory()[:])
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--json"
        ) as command:
            command.succeed()
            assert command.event("guest")["status"] == source.status() == "postmigrate"
        assert (tmp_path / "vm" / "ram" / "0.raw").read_bytes() == memory


@pytest.mark.parametrize("option", ["", "--stop"])
def test_writable_disk_is_warned_of_where_it_goes_on_changing(tmp_path: Path, option: str):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    drive = f"file={disk},format=raw,if=none,id=data"
    with (
        driven(tmp_path, "source", "-drive", drive) as source,
        Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", *option.split()
        ) as command,
    ):
        command.succeed()
        assert (f"data ({disk})" in command.stderr) is (not option)
        assert ("go on changing" in command.stderr) is (not option)
        assert "floppy" not in command.stderr  # it is read-only


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cancelled_in_the_middle_the_guest_runs_on(tmp_path: Path, number: signal.Signals):
    with driven(tmp_path) as source:
        source.set_parameter("downtime-limit", 77)
        before = settings(source)
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--json", *IN_BETWEEN
        ) as command:
            command.wait_event("qemu", status="active", transferred=1)
            command.signal(number)
            said = command.fail(5, prompt())
            assert "cancelled" in said
            assert "the guest runs on" in said
            assert command.event("failed")["exit_status"] == 5
            assert command.event("failed")["step"] == "migrating"
        assert source.query_migrate()["status"] == "cancelled"
        assert_runs_on(source)
        assert settings(source) == before
    assert_nothing_left(tmp_path)


def test_cancelled_while_qemu_is_stopped_says_how_it_goes_on(tmp_path: Path):
    with driven(tmp_path) as source:
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--json", *IN_BETWEEN
        ) as command:
            command.wait_event("qemu", status="active", transferred=1)
            source.signal(signal.SIGSTOP)
            with QemuProcess(source.pid) as process:
                wait_for("its rest", lambda: process.stopped, 5)
            command.signal(signal.SIGINT)
            said = command.fail(5, prompt())
        source.signal(signal.SIGCONT)
        assert "who has the machine is not known" in said
        assert f"kill -CONT {source.pid}" in said
        source.wait_status("running")
        assert_runs_on(source)
    assert_nothing_left(tmp_path)


def test_cancelled_before_qemu_answers(tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen(1)
        with Command("checkpoint", "--qmp", tmp_path / "silent", tmp_path / "vm") as command:
            silent.accept()[0].detach()
            command.signal(signal.SIGINT)
            command.fail(5, prompt())


def test_source_that_is_killed_has_been_there_and_leaves_nothing(tmp_path: Path):
    with (
        driven(tmp_path) as source,
        Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--json", *IN_BETWEEN
        ) as command,
    ):
        command.wait_event("qemu", status="active", transferred=1)
        source.signal(signal.SIGKILL)
        said = command.fail(1)
        assert f"the QEMU at {socket_of(source)} is gone" in said
        assert "the machine with it" in said
    assert_nothing_left(tmp_path)


def test_snapshot_stays_when_its_qemu_ends_behind_it(tmp_path: Path):
    with (
        driven(tmp_path) as source,
        Command("checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--json") as command,
    ):
        command.wait_event("completed")
        source.signal(signal.SIGKILL)
        # That may come when all is done.
        if command.wait():
            assert "is whole" in command.fail(1)
    assert_whole(tmp_path / "vm")


def test_guest_of_a_source_that_has_let_go_is_resumed_when_the_rest_fails(tmp_path: Path):
    """A source without a return path: here one that migrated to nowhere."""
    writer = SnapshotWriter(tmp_path / "vm")
    with driven(tmp_path) as source, Cancel() as cancel, Migration() as migration:
        source.wait_heartbeat(2)
        source.migrate("exec:cat > /dev/null")
        source.wait_migration()
        assert source.status() == "postmigrate"
        kept = writer.keep_incomplete()
        assert kept.exists()
        error = MigrationError("the disk is full")
        with Monitor(socket_of(source), cancel) as monitor:
            qemu = Qemu(monitor, "source", lambda _event: None)
            undo(qemu, migration, writer, error, running=True)
        assert "the guest runs on" in error.owner
        assert_runs_on(source)
    writer.abandon()
    assert_nothing_left(tmp_path)


def test_cancelled_when_all_is_written_already_there_are_a_snapshot_and_a_guest(tmp_path: Path):
    writer = SnapshotWriter(tmp_path / "vm")
    with driven(tmp_path) as source, Cancel() as cancel, Migration() as migration:
        source.wait_heartbeat(2)
        migration.run(lambda: None, "a worker that is through")
        migration.wait()
        error = MigrationCancelled("cancelled")
        with Monitor(socket_of(source), cancel) as monitor:
            qemu = Qemu(monitor, "source", lambda _event: None)
            undo(qemu, migration, writer, error, running=True)
            assert error.owner.startswith(f"the snapshot in {tmp_path}/vm is whole, and the guest")
            source.signal(signal.SIGKILL)
            source.wait_exit()
            undo(qemu, migration, writer, error, running=True)
            assert error.owner == f"the snapshot in {tmp_path}/vm is whole"
    writer.abandon()


def test_qemu_says_why_its_guest_cannot_be_migrated(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    extra = ["-drive", f"file={disk},format=raw,if=none,id=n", "-device", "nvme,drive=n,serial=1"]
    with driven(tmp_path, "source", *extra) as source:
        before = settings(source)
        with Command("checkpoint", "--qmp", socket_of(source), tmp_path / "vm") as command:
            said = command.fail(1)
            assert "non-migratable device" in said
        assert source.status() == "running"
        assert settings(source) == before
    assert_nothing_left(tmp_path)


def test_what_fails_here_leaves_the_guest_running_there(tmp_path: Path):
    with driven(tmp_path) as source:
        before = settings(source)
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm",
            prefix=["prlimit", "--fsize=1000000"],
        ) as command:  # fmt: skip
            said = command.fail(3)
            assert "ulimit -f" in said
            assert "the guest runs on" in said
        assert_runs_on(source)
        assert settings(source) == before
    assert_nothing_left(tmp_path)


def test_what_fails_here_at_the_end_leaves_the_guest_running_there(tmp_path: Path):
    with driven(tmp_path) as source:
        before = settings(source)
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--json", *IN_BETWEEN
        ) as command:
            command.wait_event("qemu", status="active", transferred=1)
            [partial] = tmp_path.glob("vm.partial-*")
            shutil.rmtree(partial)
            source.set_parameter("max-bandwidth", 1 << 30)
            said = command.fail(1)
            assert f"cannot create {tmp_path}/vm" in said
            assert "the guest runs on" in said
        assert_runs_on(source)
        assert settings(source) == before
    assert_nothing_left(tmp_path)


def test_timeout_leaves_the_guest_running_there(tmp_path: Path):
    with driven(tmp_path) as source:
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--timeout", "1", *IN_BETWEEN
        ) as command:
            assert "the guest runs on" in command.fail(5)
        assert_runs_on(source)
    assert_nothing_left(tmp_path)


def test_directory_that_exists_is_refused_and_qemu_left_alone(tmp_path: Path):
    with driven(tmp_path) as source:
        with Command("checkpoint", "--qmp", socket_of(source), tmp_path) as command:
            assert "already exists" in command.fail(1)
        assert source.query_migrate() == {}


def test_qemu_that_waits_for_a_machine_has_none_to_keep(tmp_path: Path):
    with (
        driven(tmp_path, incoming="defer") as source,
        Command("checkpoint", "--qmp", socket_of(source), tmp_path / "vm") as command,
    ):
        assert "has none yet" in command.fail(2)
    assert_nothing_left(tmp_path)


# ---- sockets ----


def test_socket_that_is_not_there(tmp_path: Path):
    with Command("checkpoint", "--qmp", tmp_path / "none", tmp_path / "vm") as command:
        said = command.fail(3)
        assert f"no QEMU at the QMP socket {tmp_path}/none: No such file" in said
        assert "-qmp unix:" in said
    assert_nothing_left(tmp_path)


def test_socket_that_is_a_human_monitor(tmp_path: Path):
    path = tmp_path / "hmp"
    with (
        driven(tmp_path, "source", "-monitor", f"unix:{path},server=on,wait=off"),
        Command("checkpoint", "--qmp", path, tmp_path / "vm") as command,
    ):
        assert f"{path} is no QMP socket" in command.fail(4)
    assert_nothing_left(tmp_path)


def test_socket_that_another_client_has(tmp_path: Path):
    with driven(tmp_path) as source, socket.socket(socket.AF_UNIX) as other:
        other.connect(socket_of(source))
        assert b"QMP" in other.recv(4096)
        with Command("checkpoint", "--qmp", socket_of(source), tmp_path / "vm") as command:
            said = command.fail(5, 30)
            assert "no QMP greeting" in said
            assert "one client at a time" in said
    assert_nothing_left(tmp_path)


def test_library_that_is_missing(tmp_path: Path):
    # As python -S would be without it: the import itself fails.
    code = (
        "import sys; sys.modules['qemu'] = None; from rdma_mig.cli.main import main; "
        "sys.argv.pop(1); sys.exit(main())"
    )
    with Command(
        "checkpoint",
        "--qmp",
        tmp_path / "none",
        tmp_path / "vm",
        prefix=[sys.executable, "-c", code],
    ) as command:
        said = command.fail(3)
        assert "pip install 'rdma-mig[qmp]'" in said


def test_second_checkpoint_while_one_is_under_way(tmp_path: Path):
    extra = ["-qmp", f"unix:{tmp_path}/second,server=on,wait=off"]
    with driven(tmp_path, "source", *extra) as source:
        source.wait_heartbeat(2)
        with Command(
            "checkpoint", "--qmp", socket_of(source), tmp_path / "vm", "--json", *IN_BETWEEN
        ) as first:
            first.wait_event("qemu", status="active", transferred=1)
            with Command("checkpoint", "--qmp", tmp_path / "second", tmp_path / "vm2") as second:
                assert "under way (active)" in second.fail(2)
            assert source.query_migrate()["status"] == "active"
            # Room is made, and the first one goes on.
            source.set_parameter("max-bandwidth", 1 << 30)
            first.succeed()
        wait_for("the guest", lambda: source.status() == "running", 10)
    assert_whole(tmp_path / "vm")


@pytest.mark.parametrize("uri", ["fd:3", "exec:cat", "file:x", "tcp:0.0.0.0:0", "rdma:[::]:0"])
def test_place_where_no_qemu_can_connect(tmp_path: Path, uri: str):
    assert status_of("checkpoint", "--qmp", "x", str(tmp_path / "vm"), "--uri", uri) == 2


def test_cancelled_while_others_fill_the_queue_of_the_socket(tmp_path: Path):
    """A unix socket whose queue is full lets nobody wait for a place with poll()."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(tmp_path / "qmp"))
        cancel = stack.enter_context(Cancel())
        began = time.monotonic()
        timer = threading.Timer(0.5, cancel.request)
        timer.start()
        with pytest.raises(MigrationCancelled, match="while connecting to the QEMU at"):
            Monitor(str(tmp_path / "qmp"), cancel)
        timer.join()
        assert 0.4 < time.monotonic() - began < 2
