# SPDX-License-Identifier: Apache-2.0
"""``recover`` makes a snapshot of what a run has left, where all is there, or says what is not."""

from __future__ import annotations

import os
import subprocess

import pytest
import snapshot_kit as kit

from rdma_mig.cli.main import main
from rdma_mig.snapshot import Snapshot, SnapshotWriter


def leave(tmp_path, memories, *, state=kit.STATE, ram=True, description=True):
    """What a run leaves that was killed when RAM was on disk and this much state had come."""
    pid = os.fork()
    if not pid:
        writer = SnapshotWriter(tmp_path / "vm")
        writer.write_config(kit.HEAD)
        writer.reserve(list(zip(kit.BLOCKS, memories, strict=True)))
        for index in range(len(kit.BLOCKS)):
            writer.write_ram(index)
        if ram:
            writer.note_written(kit.FACTS)
        writer.append_device_state(state)
        if description:
            text = kit.DESCRIPTION
            writer.append_device_state(b"\x06" + len(text).to_bytes(4, "big") + text)
        os._exit(0)
    os.waitpid(pid, 0)
    [left] = tmp_path.glob("vm.partial-*")
    return left


def recover(capsys, path, status=0):
    assert main(["recover", str(path)]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert err.count("\n") == (status != 0)
    return out if status == 0 else err


@pytest.mark.parametrize("name", ["vm.partial-1", "vm.incomplete", "vm.incomplete.1"])
def test_all_that_was_there_makes_the_snapshot(tmp_path, memories, capsys, name):
    left = leave(tmp_path, memories)
    left.rename(tmp_path / name)
    assert str(tmp_path / "vm") in recover(capsys, tmp_path / name)
    assert os.listdir(tmp_path) == ["vm"]
    whole = kit.keep(tmp_path / "whole", memories)
    assert not (tmp_path / "vm" / "written.json").exists()
    with Snapshot.open(tmp_path / "vm") as snapshot, Snapshot.open(whole) as other:
        snapshot.verify()
        assert snapshot.blocks == other.blocks
        assert snapshot.description == kit.DESCRIPTION
        assert snapshot.device_state.startswith(kit.STATE)
    files = ["diff", "-r", "--exclude=manifest.json", "--exclude=vmstate.bin"]
    assert subprocess.run([*files, tmp_path / "vm", whole], check=False).returncode == 0


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"ram": False}, "lacks RAM"),
        ({"state": b"\x04 devi", "description": False}, "lacks device state: 6 bytes arrived"),
        ({"state": b"", "description": False}, "lacks device state: 0 bytes arrived"),
    ],
)
def test_what_is_missing_is_named_and_nothing_changes(tmp_path, memories, capsys, what, said):
    left = leave(tmp_path, memories, **what)
    before = {path: path.stat().st_size for path in left.rglob("*") if path.is_file()}
    line = recover(capsys, left, 1)
    assert said in line
    assert "the source has the virtual machine: `cont` there resumes it" in line
    assert {path: path.stat().st_size for path in left.rglob("*") if path.is_file()} == before


def test_ram_that_was_damaged_meanwhile_is_found(tmp_path, memories, capsys):
    left = leave(tmp_path, memories)
    with (left / "ram" / "0.raw").open("r+b") as file:
        file.write(b"\xff" * 512)
    assert "0.raw" in recover(capsys, left, 1)
    assert os.listdir(tmp_path) == [left.name]
    # Not only the first time, when its manifest was not there yet.
    assert "0.raw" in recover(capsys, left, 1)


@pytest.mark.parametrize("raw", [b"", b"{", b"{}", b"\xff" * 100])
def test_note_that_is_damaged(tmp_path, memories, capsys, raw):
    left = leave(tmp_path, memories)
    (left / "written.json").write_bytes(raw)
    assert "written.json" in recover(capsys, left, 1)
    assert os.listdir(tmp_path) == [left.name]


def test_snapshot_that_exists_is_not_touched(tmp_path, memories, capsys):
    left = leave(tmp_path, memories)
    kit.keep(tmp_path / "vm", memories)
    line = recover(capsys, left, 1)
    assert "exists already" in line
    assert "is whole" in line
    assert sorted(os.listdir(tmp_path)) == ["vm", left.name]
    (tmp_path / "vm").rename(tmp_path / "away")
    recover(capsys, left)
    assert sorted(os.listdir(tmp_path)) == ["away", "vm"]


def test_run_at_work_keeps_its_directory(tmp_path, memories, capsys):
    with SnapshotWriter(tmp_path / "vm") as writer:
        kit.fill(writer, memories)
        [left] = tmp_path.glob("vm.partial-*")
        assert "a run works on" in recover(capsys, left, 1)
        kit.commit(writer)


@pytest.mark.parametrize("name", ["vm", "vm.partial-x", "other"])
def test_what_no_run_has_left(tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert "is not what a run has left" in recover(capsys, tmp_path / name, 1)
    assert os.listdir(tmp_path / name) == []
