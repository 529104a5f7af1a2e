# SPDX-License-Identifier: Apache-2.0
"""The process that finishes a snapshot whose writer was killed, and only then."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import snapshot_kit as kit

from rdma_mig.cli.main import main
from rdma_mig.errors import HostError, SnapshotError
from rdma_mig.migration.custody import Custody
from rdma_mig.snapshot import Snapshot, SnapshotWriter, custodian
from rdma_mig.snapshot.entrusted import DONE, READY, TAKEN
from rdma_mig.waits import Cancel

FRAME = b"\x06" + len(kit.DESCRIPTION).to_bytes(4, "big") + kit.DESCRIPTION
WAIT = 30.0


def begin(path, memories):
    """A writer up to the commit point."""
    writer = SnapshotWriter(path)
    writer.write_config(kit.HEAD)
    writer.reserve(list(zip(kit.BLOCKS, memories, strict=True)), kit.MIB)
    return writer


def receive(writer):
    """What comes behind the commit point."""
    writer.append_device_state(kit.STATE)
    writer.append_device_state(FRAME)


def write(writer):
    for index in range(len(kit.BLOCKS)):
        writer.write_ram(index)
    writer.note_written(kit.FACTS)


def commit(writer):
    writer.set_description(kit.DESCRIPTION)
    writer.commit(kit.FACTS, eof_offset=len(kit.STATE))


STEPS = (receive, write, commit)


def hand_over(writer, custody):
    with Cancel() as cancel:
        custody.wait_ready(cancel)
        custody.entrust(writer.entrust(kit.FACTS), cancel)


def state_of(pid):
    """R, S, T, Z; empty for none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def killed_after(steps, path, memories, meanwhile=lambda _pid: None):
    """A run that hands over to a custodian and is killed after these steps; wait for both.

    Args:
        meanwhile: called with the custodian's process, before the kill.
    """
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            writer = begin(path, memories)
            custody = Custody(writer.partial)
            hand_over(writer, custody)
            for step in steps:
                step(writer)
            os.write(tell, str(custody._process.pid).encode())
            signal.pause()
        os._exit(1)
    os.close(tell)
    with open(told, "rb") as pipe:
        guard = int(os.read(pipe.fileno(), 100) or b"0")
        assert guard, "it failed before its custodian was there"
        meanwhile(guard)
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    ends = time.monotonic() + WAIT
    while state_of(guard) not in ("", "Z"):
        assert time.monotonic() < ends, "the custodian does not end"
        time.sleep(0.005)
    return pid


def contents(directory):
    return {
        path.relative_to(directory): (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def assert_recovers(left, memories, room):
    assert main(["recover", str(left)]) == 0
    whole = kit.keep(room / "whole", memories)
    with Snapshot.open(room / "vm") as snapshot, Snapshot.open(whole) as other:
        snapshot.verify()
        assert snapshot.blocks == other.blocks
    found = subprocess.run(["diff", "-r", room / "vm", whole], capture_output=True, check=False)
    assert found.stdout == b""


@pytest.fixture
def cancel():
    with Cancel() as found:
        yield found


# ---- the other process was killed ----


@pytest.mark.parametrize("steps", [STEPS[:1], STEPS[:2]], ids=["received", "written"])
def test_all_that_had_arrived_is_kept_whole(tmp_path, memories, capfd, steps):
    killed_after(steps, tmp_path / "vm", memories)
    left = tmp_path / "vm.incomplete"
    assert os.listdir(tmp_path) == [left.name]
    line = capfd.readouterr().err
    assert line.startswith("rdma-migrate: incoming was killed behind the commit point; all had")
    assert f"rdma-migrate recover {left} makes" in line
    assert line.count("\n") == 1
    with Snapshot.open(left) as snapshot:
        snapshot.verify()
    assert not (left / "written.json").exists()
    assert_recovers(left, memories, tmp_path)


def test_name_that_is_taken(tmp_path, memories, capfd):
    (tmp_path / "vm.incomplete").mkdir()
    killed_after(STEPS[:1], tmp_path / "vm", memories)
    assert f"kept whole in {tmp_path / 'vm.incomplete.1'}" in capfd.readouterr().err
    assert_recovers(tmp_path / "vm.incomplete.1", memories, tmp_path)


def test_snapshot_that_has_its_name_is_not_touched(tmp_path, memories, capfd):
    before = {}

    def look(_guard):
        before.update(contents(tmp_path))

    killed_after(STEPS, tmp_path / "vm", memories, look)
    assert os.listdir(tmp_path) == ["vm"]
    assert contents(tmp_path) == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("state", [b"", kit.STATE[:5]])
def test_device_state_that_is_missing_leaves_the_partial_as_it_is(tmp_path, memories, capfd, state):
    pid = killed_after([lambda w: w.append_device_state(state)], tmp_path / "vm", memories)
    assert os.listdir(tmp_path) == [f"vm.partial-{pid}"]
    line = capfd.readouterr().err
    assert "lacks device state" in line
    assert "`cont` there resumes it" in line
    assert main(["clean", str(tmp_path / "vm"), "--remove"]) == 0
    assert os.listdir(tmp_path) == []


def recovered(left, capfd):
    """The status of recover, once the custodian has let go: its lock is closed last."""
    ends = time.monotonic() + WAIT
    while status := main(["recover", str(left)]):
        if "a run works on" not in capfd.readouterr().err or time.monotonic() > ends:
            break
        time.sleep(0.01)
    return status


def test_killed_before_each_system_call_behind_the_commit_point(memories, capfd):
    """Exhaustive: wherever the writer dies when all has arrived, a whole machine is there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "vm"
        names = []
        for point in range(1, 1000):
            finished = dies_at(point, path, memories)
            (left,) = path.parent.iterdir()
            names.append(left.name)
            if left != path:
                assert recovered(left, capfd) == 0
            with Snapshot.open(path) as snapshot:
                snapshot.verify()
            shutil.rmtree(path)
            if finished:
                break
    assert finished
    assert len(names) > 40
    assert set(names) == {"vm.incomplete", "vm"}
    assert names == sorted(names, reverse=True)
    capfd.readouterr()


def dies_at(point, path, memories):
    """Let a run die before this system call; return whether it ended without making so many.

    Its custodian is a fork, which takes no time to start.
    """
    ended, open_while_both_live = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            ours, theirs = socket.socketpair()
            left = path.with_name(f"{path.name}.partial-{os.getpid()}")
            if not os.fork():
                ours.close()
                with contextlib.suppress(BaseException):
                    custodian.guard(theirs, left)
                os._exit(0)
            theirs.close()
            run_and_die(point, path, memories, ours)
            os._exit(0)
        os._exit(1)
    os.close(open_while_both_live)
    with open(ended, "rb") as pipe:
        status = os.waitpid(pid, 0)[1]
        assert pipe.read() == b""
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert status == 0
    return True


def run_and_die(point, path, memories, channel):
    made = 0

    def watch(_frame, event, called):
        nonlocal made
        if event == "c_call" and getattr(called, "__module__", "") in ("posix", "fcntl"):
            made += 1
            if made == point:
                os.kill(os.getpid(), signal.SIGKILL)

    writer = begin(path, memories)
    assert channel.recv(1) == READY
    writer.entrust(kit.FACTS).send(channel)
    assert channel.recv(1) == TAKEN
    receive(writer)
    sys.setprofile(watch)
    write(writer)
    commit(writer)
    sys.setprofile(None)
    channel.sendall(DONE)


# ---- the other process ended in order ----


@contextlib.contextmanager
def entrusted(path, memories):
    """A writer that has handed over, and the custodian."""
    with begin(path, memories) as writer, Custody(writer.partial) as custody:
        hand_over(writer, custody)
        yield writer, custody


def test_orderly_end_touches_nothing(tmp_path, memories, capfd):
    with entrusted(tmp_path / "vm", memories) as (writer, custody):
        receive(writer)
        pid = custody._process.pid
        before = contents(tmp_path)
        custody.close()
        custody.close()
        assert custody._process.returncode == 0
        assert state_of(pid) == ""
        assert contents(tmp_path) == before
        write(writer)
        commit(writer)
    assert os.listdir(tmp_path) == ["vm"]
    assert capfd.readouterr().err == ""


def test_failure_that_is_dealt_with_leaves_nothing(tmp_path, memories):
    with entrusted(tmp_path / "vm", memories) as (writer, _custody):
        receive(writer)
    assert os.listdir(tmp_path) == []


def test_partial_is_at_work_while_the_custodian_is(tmp_path, memories, capsys):
    def look(_guard):
        (left,) = tmp_path.iterdir()
        assert main(["recover", str(left)]) == 1
        assert "a run works on" in capsys.readouterr().err

    def stop_too(guard):
        os.kill(guard, signal.SIGSTOP)
        look(guard)

    killed_after(STEPS[:1], tmp_path / "vm", memories, look)
    assert os.listdir(tmp_path) == ["vm.incomplete"]
    shutil.rmtree(tmp_path / "vm.incomplete")

    with entrusted(tmp_path / "vm", memories) as (writer, custody):
        writer._close()  # as the kernel does when the process ends
        stop_too(custody._process.pid)
        os.kill(custody._process.pid, signal.SIGCONT)


def test_nothing_is_left_in_this_process(tmp_path, memories, monkeypatch):
    monkeypatch.setattr("rdma_mig.migration.custody._END_SECONDS", 30)
    began = time.monotonic()

    def held():
        names = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # of the list itself
                names.append(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
        return sorted(names)

    def children():
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    before = held(), children()
    for number in range(4):
        with entrusted(tmp_path / f"vm{number}", memories):
            pass
        with begin(tmp_path / f"vm{number}", memories) as writer, Custody(writer.partial):
            pass
    assert (held(), children()) == before
    assert time.monotonic() - began < 30


# ---- the custodian itself ----


def test_it_has_no_memory_of_the_guest_before_and_is_small(tmp_path, memories, cancel):
    with begin(tmp_path / "vm", memories) as writer, Custody(writer.partial) as custody:
        custody.wait_ready(cancel)
        proc = Path(f"/proc/{custody._process.pid}")
        assert [fd.name for fd in (proc / "fd").iterdir() if "memfd" in os.readlink(fd)] == []
        mine = dict(
            line.split()[:2] for line in (proc / "smaps_rollup").read_text().splitlines()[1:]
        )
        assert int(mine["Private_Dirty:"]) < 24 << 10, "KiB"
        maps = (proc / "maps").read_text()
        assert "pyverbs" not in maps
        assert "numpy" not in maps
        assert os.getsid(custody._process.pid) != os.getsid(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_do_not_end_it(tmp_path, memories, number):
    def signalled(guard):
        os.kill(guard, number)

    killed_after(STEPS[:1], tmp_path / "vm", memories, signalled)
    assert os.listdir(tmp_path) == ["vm.incomplete"]


def test_both_killed_is_as_without_it(tmp_path, memories, capfd):
    def killed(guard):
        os.kill(guard, signal.SIGKILL)

    pid = killed_after(STEPS[:1], tmp_path / "vm", memories, killed)
    assert os.listdir(tmp_path) == [f"vm.partial-{pid}"]
    assert main(["recover", str(tmp_path / f"vm.partial-{pid}")]) == 1
    assert "lacks RAM" in capfd.readouterr().err


def test_custodian_that_is_killed_alone_changes_nothing(tmp_path, memories):
    with entrusted(tmp_path / "vm", memories) as (writer, custody):
        os.kill(custody._process.pid, signal.SIGKILL)
        receive(writer)
        write(writer)
        commit(writer)
    assert os.listdir(tmp_path) == ["vm"]


def test_custodian_that_does_not_answer_is_ended(tmp_path, memories, monkeypatch):
    monkeypatch.setattr("rdma_mig.migration.custody._END_SECONDS", 0.2)
    with entrusted(tmp_path / "vm", memories) as (_writer, custody):
        pid = custody._process.pid
        os.kill(pid, signal.SIGSTOP)
        custody.close()
        assert state_of(pid) == ""


def test_custodian_that_takes_nothing_is_told_apart(tmp_path, memories, monkeypatch, cancel):
    monkeypatch.setattr("rdma_mig.migration.custody._TAKE_SECONDS", 0.2)
    with begin(tmp_path / "vm", memories) as writer, Custody(writer.partial) as custody:
        custody.wait_ready(cancel)
        pid = custody._process.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(HostError, match=r"did not take RAM within 0\.2 s"):
            custody.entrust(writer.entrust(kit.FACTS), cancel)
        receive(writer)
        custody.close()
        assert state_of(pid) == ""
        assert os.listdir(tmp_path) == [writer.partial.name]


def test_disk_that_takes_no_more(tmp_path, memories, capfd):
    """It says so, and leaves the partial, whose RAM is not called whole."""

    def limited(guard):
        resource.prlimit(guard, resource.RLIMIT_FSIZE, (kit.MIB, kit.MIB))

    pid = killed_after(STEPS[:1], tmp_path / "vm", memories, limited)
    assert os.listdir(tmp_path) == [f"vm.partial-{pid}"]
    line = capfd.readouterr().err
    assert "0.raw: File too large" in line
    assert line.count("\n") == 1
    assert main(["recover", str(tmp_path / f"vm.partial-{pid}")]) == 1
    assert "lacks RAM" in capfd.readouterr().err


def test_manifest_that_cannot_be_completed_leaves_what_recover_goes_on_from(tmp_path, memories):
    with begin(tmp_path / "vm", memories) as writer:
        receive(writer)
        left = writer.partial
        (left / "manifest.json").write_bytes(b"{")
        (left / "vmdesc.json").unlink()
        (left / "vmdesc.json").symlink_to("/dev/null")
        handed = writer.entrust(kit.FACTS)
        memory = tuple(map(os.dup, handed.memories))
        with pytest.raises(SnapshotError, match="symbolic link"):
            custodian.finish(replace(handed, memories=memory), left)
        assert (left / "manifest.json").read_bytes() == b""
        assert (left / "written.json").exists()
        writer._close()
    (left / "vmdesc.json").unlink()
    assert_recovers(left, memories, tmp_path)


# ---- it cannot be started ----


def test_python_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(HostError, match="cannot be started: No such file or directory"):
        Custody(tmp_path / "vm.partial-1")


def test_python_that_has_no_such_module(tmp_path, monkeypatch, cancel):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        Custody(tmp_path / "vm.partial-1") as custody,
        pytest.raises(HostError, match="ended before it could start"),
    ):
        custody.wait_ready(cancel)


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_descriptors_that_are_used_up(tmp_path, spare):
    before = sorted(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, limits[1]))
        with pytest.raises(HostError, match="cannot be started: Too many open files"):
            Custody(tmp_path / "vm.partial-1")
    assert sorted(os.listdir("/proc/self/fd")) == before
