# SPDX-License-Identifier: Apache-2.0
"""rdma-migrate restore: a snapshot into a real QEMU that waits, or that is started for it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import qemu_binary
from manager_kit import (
    GUEST,
    assert_proves_its_ram,
    check_keys,
    driven,
    settings,
    socket_of,
    status_of,
    waiting,
)
from support import Command, prompt, wait_for

from rdma_mig.errors import SnapshotError
from rdma_mig.snapshot import require_trustworthy

TO = {"private": "", "tcp": "--uri tcp:127.0.0.1:0", "unix": "--uri unix:{}/meet"}


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("kind", TO)
def test_guest_runs_in_the_qemu_that_waited(tmp_path: Path, stored: Path, kind: str):
    with waiting(tmp_path) as destination:
        destination.set_capability("events", True)
        before = settings(destination)
        options = TO[kind].format(tmp_path).split()
        with Command(
            "restore", stored, "--qmp", socket_of(destination), "--json", *options
        ) as command:
            command.succeed()
            names = check_keys(command)
            assert names[-1] == "guest"
            assert names.count("recorded") == 1
            assert command.event("guest")["status"] == "running"
            assert "on the return path" in command.event("completed")["confirmed"]
            assert "-machine" in command.event("recorded")["arguments"]
        assert settings(destination) == before
        assert_proves_its_ram(destination)


@pytest.mark.parametrize("option", ["", "--stop"])
@pytest.mark.parametrize("paused", [False, True], ids=["", "-S"])
def test_what_becomes_of_the_guest_is_as_asked(
    tmp_path: Path, stored: Path, option: str, paused: bool
):
    with waiting(tmp_path, paused=paused) as destination:
        with Command(
            "restore", stored, "--qmp", socket_of(destination), *option.split()
        ) as command:
            command.succeed()
        assert destination.status() == ("paused" if option else "running")


def test_guest_that_was_paused_comes_back_paused(tmp_path: Path):
    with driven(tmp_path) as source:
        source.wait_heartbeat(2)
        source.stop()
        with Command("checkpoint", "--qmp", socket_of(source), tmp_path / "vm") as command:
            command.succeed()
    with waiting(tmp_path) as destination:
        with Command("restore", tmp_path / "vm", "--qmp", socket_of(destination)) as command:
            command.succeed()
        assert destination.status() == "paused"


# ---- what QEMU says ----


def test_wrong_machine_is_told_in_qemu_s_words(tmp_path: Path, stored: Path):
    with waiting(tmp_path, machine="q35") as destination:
        with Command("restore", stored, "--qmp", socket_of(destination), "--json") as command:
            said = command.fail(1)
            assert "Machine type received is 'pc-i440fx" in said
            assert "is unchanged" in said
            assert command.event("failed")["exit_status"] == 1
        destination.wait_exit()


def test_device_that_is_missing_is_told_in_qemu_s_words(tmp_path: Path):
    with (
        driven(tmp_path, "source", "-device", "virtio-rng-pci") as source,
        Command("checkpoint", "--qmp", socket_of(source), tmp_path / "vm") as command,
    ):
        command.succeed()
    with (
        waiting(tmp_path) as destination,
        Command("restore", tmp_path / "vm", "--qmp", socket_of(destination)) as command,
    ):
        assert "Unknown savevm section" in command.fail(1)


def test_qemu_that_runs_a_guest_is_shown_how_to_start_it(tmp_path: Path, stored: Path):
    with (
        driven(tmp_path) as other,
        Command("restore", stored, "--qmp", socket_of(other)) as command,
    ):
        said = command.fail(2)
        assert "does not wait for a machine" in said
        # The command to paste is its own, with what it lacks.
        assert "start it with -incoming defer: qemu-system-x86_64 -nodefaults" in said
        assert said.endswith("-incoming defer")
        assert f"-qmp unix:{socket_of(other)}" in said
        assert other.status() == "running"


def test_qemu_that_listens_already_is_shown_how_to_start_it(tmp_path: Path, stored: Path):
    with (
        driven(tmp_path, incoming=f"unix:{tmp_path}/elsewhere") as other,
        Command("restore", stored, "--qmp", socket_of(other)) as command,
    ):
        said = command.fail(2)
        assert "already" in said
        assert said.endswith("-incoming defer")
        assert str(tmp_path / "elsewhere") not in said


def test_port_that_the_qemu_cannot_have(tmp_path: Path, stored: Path):
    with waiting(tmp_path) as destination:
        before = settings(destination)
        with Command(
            "restore", stored, "--qmp", socket_of(destination), "--uri", "tcp:192.0.2.77:4444"
        ) as command:
            assert "Cannot assign requested address" in command.fail(1)
        assert destination.status() == "inmigrate"
        assert settings(destination) == before
        # Nothing is used up by that.
        with Command("restore", stored, "--qmp", socket_of(destination)) as command:
            command.succeed()
        assert destination.status() == "running"


# ---- ends in the middle ----


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot that takes a destination some while to load."""
    directory = tmp_path_factory.mktemp("slow")
    guest = type(GUEST).dirtying(96)
    with driven(directory, guest=guest, memory_mib=128) as source:
        source.wait_heartbeat(2)
        source.stop()  # on a busy machine it writes faster than it can be sent
        with Command("checkpoint", "--qmp", socket_of(source), directory / "vm") as command:
            command.succeed()
    return directory / "vm"


@contextmanager
def stopped_in_the_middle(directory: Path, snapshot: Path) -> Iterator[tuple[object, Command]]:
    """A QEMU that is stopped (SIGSTOP) while it loads."""
    with (
        waiting(directory, memory_mib=128) as destination,
        Command("restore", snapshot, "--qmp", socket_of(destination), "--json") as command,
    ):
        command.wait_event("connected")
        destination.signal(signal.SIGSTOP)
        time.sleep(0.3)
        assert command.process.poll() is None
        assert "completed" not in [event["event"] for event in command.events()]
        yield destination, command


def test_destination_that_is_killed_in_the_middle(tmp_path: Path, slow: Path):
    with stopped_in_the_middle(tmp_path, slow) as (destination, command):
        destination.signal(signal.SIGKILL)
        said = command.fail(1, 30)
        assert "is gone" in said or "closed" in said
        assert "is unchanged" in said


def test_cancelled_in_the_middle(tmp_path: Path, slow: Path):
    with (
        waiting(tmp_path, memory_mib=128) as destination,
        Command("restore", slow, "--qmp", socket_of(destination), "--json") as command,
    ):
        command.wait_event("connected")
        command.signal(signal.SIGINT)
        said = command.fail(5, prompt())
        assert "is unchanged" in said
        assert command.event("failed")["exit_status"] == 5
        destination.wait_exit()


# ---- a QEMU that is started for it ----


def bare(*extra: str) -> list[str]:
    return [qemu_binary(), "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg",
            "-machine", "pc", "-m", "64", *extra]  # fmt: skip


@contextmanager
def bare_checkpoint(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A QEMU whose command line needs nothing of the harness, and its checkpoint."""
    qmp = directory / "bare.qmp"
    process = subprocess.Popen(bare("-qmp", f"unix:{qmp},server=on,wait=off"))
    try:
        wait_for("its socket", qmp.exists, 20)
        with Command("checkpoint", "--qmp", qmp, directory / "vm") as command:
            command.succeed()
        yield process, directory / "vm"
    finally:
        process.kill()
        process.wait()


def pid_of(command: Command) -> int:
    found = re.search(
        r"the QEMU runs on: pid (\d+), QMP socket (\S+), messages in (\S+)\n", command.stderr
    )
    assert found, command.epitaph()
    assert Path(found[2]).exists()
    return int(found[1])


@contextmanager
def ended(command: Command) -> Iterator[int]:
    """The QEMU that a command has left, which is killed at the end."""
    pid = pid_of(command)
    try:
        yield pid
    finally:
        directory = Path(command.stderr.rpartition("messages in ")[2].strip()).parent
        os.kill(pid, signal.SIGKILL)
        assert directory.name.startswith("rdma-migrate-")
        shutil.rmtree(directory)


def test_qemu_is_started_has_the_guest_and_runs_on(tmp_path: Path):
    with bare_checkpoint(tmp_path) as (_process, snapshot):
        pass
    with Command("restore", snapshot, "--spawn", "--", *bare()) as command:
        command.succeed()
        with ended(command) as pid:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            assert words[words.index("-incoming") + 1] == "defer"
            assert "is running" in command.stderr
            # Whom it is left to: its socket serves the next one.
            qmp = words[words.index("-qmp") + 1].removeprefix("unix:").partition(",")[0]
            with Command("checkpoint", "--qmp", qmp, tmp_path / "again") as again:
                again.succeed()


def test_qemu_that_was_started_ends_when_it_does_not_take_the_machine(tmp_path: Path, stored: Path):
    before = set(Path("/tmp").glob("rdma-migrate-*"))
    with Command("restore", stored, "--spawn", "--", *bare("-name", "lacks-devices")) as command:
        said = command.fail(1)
        assert "Length mismatch" in said or "Unknown" in said, said
    found = subprocess.run(["pgrep", "-f", "lacks-devices"], check=False, capture_output=True)
    assert not found.stdout
    assert set(Path("/tmp").glob("rdma-migrate-*")) == before


def test_started_qemu_says_what_is_wrong_with_its_command(stored: Path):
    with Command("restore", stored, "--spawn", "--", *bare("-device", "no-such")) as command:
        assert "'no-such' is not a valid device model name" in command.fail(1)
    with Command("restore", stored, "--spawn", "--", "/nonexistent/qemu") as command:
        assert "cannot be started" in command.fail(3)


@pytest.mark.parametrize(
    "options",
    [
        ["--spawn"],
        ["--spawn", "--"],
        ["--qmp", "x", "--", "qemu"],
        ["--spawn", "--", "qemu", "-daemonize"],
        ["--spawn", "--", "qemu", "-incoming", "tcp:0:4444"],
        ["--qmp", "x", "--spawn", "--", "qemu"],
        ["--qmp", "x", "--uri", "rdma:192.0.2.1:0"],
        ["--qmp", "x", "--rdma-device", "rxe0"],
        [],
    ],
)
def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]):
    assert status_of("restore", str(tmp_path), *options) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_recorded_command_is_run_when_it_is_trusted(tmp_path: Path):
    with (
        bare_checkpoint(tmp_path) as (_process, snapshot),
        Command("restore", snapshot, "--trust-recorded-command") as command,
    ):
        # Two guests would write to one disk.
        assert "still listens" in command.fail(2)
    with Command("restore", snapshot, "--trust-recorded-command") as command:
        command.succeed()
        with ended(command):
            assert "is running" in command.stderr


@pytest.mark.parametrize("what", ["manifest.json", "command.json", "ram", "ram/0.raw", ".", ".."])
@pytest.mark.parametrize("mode", [0o020, 0o002], ids=["group", "others"])
def test_snapshot_that_others_can_write_is_not_trustworthy(
    tmp_path: Path, stored: Path, what: str, mode: int
):
    (tmp_path / "place").mkdir(mode=0o700)
    snapshot = tmp_path / "place" / "vm"
    shutil.copytree(stored, snapshot)
    require_trustworthy(snapshot)
    changed = snapshot / what
    changed.chmod(changed.stat().st_mode | mode)
    with pytest.raises(SnapshotError, match="can be written by others") as error:
        require_trustworthy(snapshot)
    assert f"{os.path.normpath(changed)} can" in error.value.message


def test_symbolic_link_in_a_snapshot_is_not_trustworthy(tmp_path: Path, stored: Path):
    shutil.copytree(stored, tmp_path / "vm")
    (tmp_path / "vm" / "command.json").rename(tmp_path / "elsewhere")
    (tmp_path / "vm" / "command.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match="is a symbolic link"):
        require_trustworthy(tmp_path / "vm")
    # A link to the directory is none in it; where it lies counts as well.
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "link").symlink_to(stored)
    require_trustworthy(stored)
    with pytest.raises(SnapshotError, match=f"{tmp_path}/open can be written by others"):
        require_trustworthy(tmp_path / "open" / "link")


def test_recorded_command_is_not_run_where_the_group_can_write(tmp_path: Path, stored: Path):
    shutil.copytree(stored, tmp_path / "vm")
    (tmp_path / "vm" / "manifest.json").chmod(0o620)
    with Command("restore", tmp_path / "vm", "--trust-recorded-command") as command:
        said = command.fail(1)
        assert f"the recorded command is not run: {tmp_path}/vm/manifest.json can be" in said
        assert "chmod go-w" in said


@pytest.mark.root
def test_recorded_command_of_somebody_else_is_not_run(tmp_path: Path, stored: Path):
    shutil.copytree(stored, tmp_path / "vm")
    os.chown(tmp_path / "vm" / "command.json", 65534, 65534)
    with Command("restore", tmp_path / "vm", "--trust-recorded-command") as command:
        assert "belongs to uid 65534" in command.fail(1)


def test_no_command_is_recorded(tmp_path: Path, stored: Path):
    shutil.copytree(stored, tmp_path / "vm")
    (tmp_path / "vm" / "command.json").unlink()
    with Command("restore", tmp_path / "vm", "--trust-recorded-command") as command:
        assert "no command is recorded" in command.fail(2)
    (tmp_path / "vm" / "command.json").write_text('{"arguments": ["rm"]}')
    with Command("restore", tmp_path / "vm", "--trust-recorded-command") as command:
        assert "is damaged" in command.fail(1)


def test_inspect_shows_the_recorded_command(stored: Path):
    with Command("inspect", stored) as command:
        assert "started as    qemu-system-x86_64 -nodefaults" in command.succeed().stdout
