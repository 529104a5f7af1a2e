# SPDX-License-Identifier: Apache-2.0
"""What unfinished runs leave: listed, and removed only where nobody works on it and it is ours."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path

import pytest
import snapshot_kit as kit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.output import check_output

from rdma_mig.cli.main import main
from rdma_mig.snapshot import Snapshot, SnapshotWriter


def leave(tmp_path, memories, name):
    """A partial as a killed run leaves it, or what a failure kept."""
    writer = SnapshotWriter(tmp_path / "vm")
    kit.fill(writer, memories)
    kept = writer.keep_incomplete()
    kept.rename(tmp_path / name)
    return tmp_path / name


def clean(capsys, *arguments, status=0):
    assert main(["clean", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out if status == 0 else err


@pytest.mark.parametrize("by_name", [True, False])
def test_everything_is_listed_and_nothing_is_changed(tmp_path, memories, capsys, by_name):
    leave(tmp_path, memories, "vm.partial-7.1")
    leave(tmp_path, memories, "vm.incomplete")
    leave(tmp_path, memories, "other.partial-7")
    (tmp_path / "vm.partial-x").mkdir()
    (tmp_path / "vm.partial-8").write_text("a file")
    before = sorted(os.listdir(tmp_path))
    shown = clean(capsys, tmp_path / "vm" if by_name else tmp_path, "--json")
    found = check_output("clean", json.loads(shown))
    assert [(os.path.basename(entry["path"]), entry["kind"]) for entry in found] == [
        *([] if by_name else [("other.partial-7", "partial")]),
        ("vm.incomplete", "incomplete"),
        ("vm.partial-7.1", "partial"),
    ]
    for entry in found:
        assert entry["disk_bytes"] > kit.MIB
        assert (entry["in_use"], entry["removed"]) == (False, False)
    assert sorted(os.listdir(tmp_path)) == before


def test_partials_are_removed_and_what_may_be_the_only_copy_is_not(tmp_path, memories, capsys):
    leave(tmp_path, memories, "vm.partial-7")
    leave(tmp_path, memories, "vm.incomplete.1")
    out = clean(capsys, tmp_path / "vm", "--remove")
    assert "vm.partial-7" in out
    assert "removed" in out
    assert os.listdir(tmp_path) == ["vm.incomplete.1"]
    clean(capsys, tmp_path / "vm", "--remove", "--incomplete")
    assert os.listdir(tmp_path) == []
    assert "nothing was left" in clean(capsys, tmp_path / "vm")


def test_a_run_at_work_is_left_alone(tmp_path, memories, capsys):
    with SnapshotWriter(tmp_path / "vm") as writer:
        kit.fill(writer, memories)
        assert "a run works on it" in clean(capsys, tmp_path / "vm", "--remove")
        kit.commit(writer)
    with Snapshot.open(tmp_path / "vm") as snapshot:
        snapshot.verify()


def test_a_run_that_takes_it_up_meanwhile_keeps_it(tmp_path, memories, capsys, monkeypatch):
    from rdma_mig.snapshot import leftovers

    left = leave(tmp_path, memories, "vm.partial-7")
    (left / "manifest.json").touch()
    found = leftovers.find(tmp_path)
    with (left / "manifest.json").open() as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        with pytest.raises(leftovers.SnapshotError, match="a run works on"):
            leftovers.remove(found[0])
    assert left.exists()


def test_what_is_not_ours_is_not_removed(tmp_path, memories, capsys):
    left = leave(tmp_path, memories, "vm.partial-7")
    (left / "thesis.txt").write_text("of somebody")
    line = clean(capsys, tmp_path, "--remove", status=1)
    assert "thesis.txt, which is no part of a snapshot" in line
    assert len(line.splitlines()) == 1
    assert (left / "thesis.txt").exists()


def test_links_are_not_followed(tmp_path, memories, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = tmp_path / "place"
    place.mkdir()
    left = leave(tmp_path, memories, "elsewhere/vm.partial-7")
    (place / "vm.partial-7").symlink_to(left)
    assert "nothing was left" in clean(capsys, place, "--remove")
    assert left.exists()


def test_a_directory_that_is_not_there(tmp_path, capsys):
    assert "cannot list" in clean(capsys, tmp_path / "no" / "vm", status=1)


def test_incomplete_goes_with_remove(tmp_path, capsys):
    assert "--remove" in clean(capsys, tmp_path, "--incomplete", status=2)


def test_restorations_are_kept_and_shown(tmp_path, memories, capsys):
    path = kit.keep(tmp_path / "vm", memories)
    with Snapshot.open(path) as snapshot:
        assert snapshot.restorations() == []
        snapshot.note_restoration("then to there")
        snapshot.note_restoration("later to\x1b elsewhere")
    with Snapshot.open(path) as snapshot:
        assert snapshot.restorations() == ["then to there", "later to\\x1b elsewhere"]
        snapshot.verify()
    assert main(["inspect", str(path)]) == 0
    assert "restored      then to there" in capsys.readouterr().out
