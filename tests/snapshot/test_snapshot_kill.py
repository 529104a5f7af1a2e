# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at any moment: a whole directory or none, and a partial that the next run reports."""

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import snapshot_kit as kit

from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.snapshot import Snapshot, SnapshotWriter

MIB = 1 << 20


def forked(work):
    """Run ``work`` in a child that does nothing else; its PID."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def check_and_clear(path):
    """What a run that was killed may leave, and nothing else. True when DIR is there."""
    names = set(os.listdir(path.parent))
    partial = {name for name in names if name.startswith("vm.partial-")}
    assert names - partial <= {"vm"}
    if done := "vm" in names:
        assert not partial
        with Snapshot.open(path) as snapshot:
            snapshot.verify()
            assert snapshot.blocks
        shutil.rmtree(path)
    with SnapshotWriter(path) as writer:
        assert {stale.name for stale in writer.stale} == partial
        for name in partial:
            shutil.rmtree(path.parent / name)
    assert os.listdir(path.parent) == []
    return done, bool(partial)


@pytest.fixture
def in_memory():
    """A directory where fsync is free: a killed process, unlike a lost host, loses no cache."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def test_killed_before_each_of_its_system_calls(in_memory, memories):
    """Exhaustive: every call that the writer makes into os or fcntl is a place to die."""
    path = in_memory / "vm"

    def write(die_at):
        made = 0

        def watch(_frame, event, called):
            nonlocal made
            if event == "c_call" and getattr(called, "__module__", "") in ("posix", "fcntl"):
                made += 1
                if made == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(watch)
        kit.keep(path, memories)

    outcomes = []
    for point in range(1, 1000):
        status = os.waitpid(forked(lambda at=point: write(at)), 0)[1]
        finished = status == 0
        if not finished:
            assert os.WTERMSIG(status) == signal.SIGKILL
        outcomes.append(check_and_clear(path))
        if finished:
            break
    assert finished
    # It went through all three states, in this order: nothing, a partial, the whole.
    assert outcomes[0] == (False, False)
    assert outcomes[-1] == (True, False)
    assert len(outcomes) > 50
    assert outcomes == sorted(outcomes), "a whole or partial directory went away again"


def test_killed_at_any_time(tmp_path):
    path = tmp_path / "vm"
    block = RamBlock("pc.ram", 16 * MIB)
    with GuestMemory(block.length, "pc.ram") as memory:
        with memory.view() as view:
            view[:] = kit.noise(len(view))

        def write():
            kit.keep(path, [memory], (block,))

        begun = time.monotonic()
        assert os.waitpid(forked(write), 0)[1] == 0
        took = time.monotonic() - begun
        assert check_and_clear(path) == (True, False)
        outcomes = []
        # Later and later, until one was let finish: a busy machine may take its time.
        while len(outcomes) < 20 or (True, False) not in outcomes:
            assert len(outcomes) < 300, "no run was let finish"
            pid = forked(write)
            time.sleep(took * len(outcomes) / 15)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            outcomes.append(check_and_clear(path))
    assert (False, True) in outcomes, "no kill met a writer at work"


def test_a_partial_at_work_is_not_stale(tmp_path, memories):
    path = tmp_path / "vm"
    with SnapshotWriter(path) as first, SnapshotWriter(path) as second:
        assert first.stale == second.stale == []
        kit.fill(first, memories)
        with SnapshotWriter(path) as third:
            assert third.stale == []
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == []


def test_stale_partials_are_left_alone(tmp_path, memories):
    stale = [tmp_path / "vm.partial-1", tmp_path / f"vm.partial-{os.getpid()}"]
    for directory in stale:
        directory.mkdir()
        (directory / "manifest.json").touch()
    (tmp_path / "vm.partial-2").write_text("a file of someone's")
    (tmp_path / "other.partial-3").mkdir()
    with SnapshotWriter(tmp_path / "vm") as writer:
        assert sorted(writer.stale) == sorted(stale)
        kit.fill(writer, memories)
        kit.commit(writer)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["vm", "vm.partial-2", "other.partial-3", *(directory.name for directory in stale)]
    )
