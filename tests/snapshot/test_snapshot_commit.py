# SPDX-License-Identifier: Apache-2.0
"""The moment a snapshot gets its name, and what becomes of it when that fails."""

import errno
import os
import subprocess
from dataclasses import replace

import pytest
import snapshot_kit as kit

from rdma_mig.errors import SnapshotError
from rdma_mig.snapshot import Snapshot, SnapshotWriter, _fs

MIB = 1 << 20


def one_line(error):
    assert str(error).isprintable()
    assert error.remedy
    return str(error)


@pytest.mark.parametrize("kind", ["snapshot", "file", "dangling link", "empty directory"])
def test_dir_exists(tmp_path, memories, kind):
    path = tmp_path / "vm"
    match kind:
        case "snapshot":
            kit.keep(path, memories)
        case "file":
            path.write_text("x")
        case "dangling link":
            path.symlink_to("nowhere")
        case "empty directory":
            path.mkdir()
    before = subprocess.run(["ls", "-lR", tmp_path], check=True, capture_output=True).stdout
    with pytest.raises(SnapshotError, match="already exists") as caught:
        SnapshotWriter(path)
    assert f"rm -r {path}" in one_line(caught.value)
    after = subprocess.run(["ls", "-lR", tmp_path], check=True, capture_output=True).stdout
    assert before == after


def test_parent_missing(tmp_path):
    with pytest.raises(SnapshotError, match="No such file") as caught:
        SnapshotWriter(tmp_path / "no" / "vm")
    assert f"mkdir -p {tmp_path}/no" in one_line(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match="not a directory"):
        SnapshotWriter(tmp_path / "file" / "vm")
    with pytest.raises(SnapshotError, match="cannot be a snapshot"):
        SnapshotWriter("/")
    with pytest.raises(SnapshotError, match="shorter name"):
        SnapshotWriter(tmp_path / ("x" * 250))
    assert os.listdir(tmp_path) == ["file"]


def test_relative_paths_and_slashes(tmp_path, memories, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with SnapshotWriter("vm/") as writer:
        os.chdir("/")
        kit.fill(writer, memories)
        assert kit.commit(writer) == tmp_path / "vm"
    assert os.listdir(tmp_path) == ["vm"]


@pytest.mark.parametrize("system", ["renameat2", "no renameat2"])
@pytest.mark.parametrize("content", ["empty", "full"])
def test_dir_comes_into_existence_meanwhile(tmp_path, memories, monkeypatch, system, content):
    if system != "renameat2":
        monkeypatch.setattr(_fs, "_renameat2", lambda *args: errno.EINVAL)
    path = tmp_path / "vm"
    with SnapshotWriter(path) as writer:
        kit.fill(writer, memories)
        path.mkdir()
        if content == "full":
            (path / "precious").write_text("data")
        with pytest.raises(SnapshotError, match="came into existence") as caught:
            kit.commit(writer)
        assert writer.kept_at == tmp_path / "vm.incomplete"
    assert f"everything received is kept in {path}.incomplete" in one_line(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["vm", "vm.incomplete"]
    assert os.listdir(path) == (["precious"] if content == "full" else [])
    # It is whole, only its name was taken.
    with Snapshot.open(tmp_path / "vm.incomplete") as snapshot:
        snapshot.verify()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_rename_noreplace(tmp_path, memories, monkeypatch, code):
    monkeypatch.setattr(_fs, "_renameat2", lambda *args: code)
    kept = kit.keep(tmp_path / "vm", memories)
    assert os.listdir(tmp_path) == ["vm"]
    with Snapshot.open(kept) as snapshot:
        snapshot.verify()


def test_the_loser_of_two_writers_keeps_its_own(tmp_path, memories):
    path = tmp_path / "vm"
    with SnapshotWriter(path) as first, SnapshotWriter(path) as second:
        kit.fill(first, memories)
        kit.fill(second, memories)
        kit.commit(first)
        with pytest.raises(SnapshotError, match="came into existence"):
            kit.commit(second)
    subprocess.run(["diff", "-r", path, tmp_path / "vm.incomplete"], check=True)


def test_incomplete_names_are_not_reused(tmp_path, memories):
    path = tmp_path / "vm"
    kept = []
    for _ in range(3):
        with SnapshotWriter(path) as writer:
            writer.append_device_state(b"so far")
            kept.append(writer.keep_incomplete())
            assert writer.keep_incomplete() == kept[-1]
            writer.abandon()
    assert [one.name for one in kept] == ["vm.incomplete", "vm.incomplete.1", "vm.incomplete.2"]
    assert (kept[0] / "vmstate.bin").read_bytes() == b"so far"
    with SnapshotWriter(path) as writer:
        assert writer.stale == []
    with pytest.raises(SnapshotError, match="incomplete one"):
        Snapshot.open(kept[0])


def test_a_failure_after_the_commit_point_keeps_everything(tmp_path, memories):
    def fail(*, late):
        with SnapshotWriter(tmp_path / "vm") as writer:
            writer.reserve(list(zip(kit.BLOCKS, memories, strict=True)), MIB)
            writer.keep_on_failure = late
            writer.append_device_state(b"half of")
            writer.write_ram(0)
            raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        fail(late=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConnectionError):
        fail(late=True)
    kept = tmp_path / "vm.incomplete"
    assert os.listdir(tmp_path) == [kept.name]
    assert sorted(os.listdir(kept)) == ["ram", "vmstate.bin"]
    assert (kept / "vmstate.bin").read_bytes() == b"half of"
    assert os.stat(kept / "vmstate.bin").st_blocks * 512 <= 4096, "the reserve was kept"
    with memories[0].view() as view:
        assert (kept / "ram/0.raw").read_bytes() == view


@pytest.mark.parametrize("which", ["a file", "the parent"])
def test_fsync_fails(tmp_path, memories, monkeypatch, which):
    real, parent = os.fsync, os.stat(tmp_path).st_ino

    def fsync(fd):
        is_parent = os.fstat(fd).st_ino == parent
        if is_parent == (which == "the parent"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with SnapshotWriter(tmp_path / "vm") as writer:
        kit.fill(writer, memories)
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(SnapshotError, match=r"Input/output error.*dmesg") as caught:
            kit.commit(writer)
        monkeypatch.undo()
    where = tmp_path / ("vm" if which == "the parent" else "vm.incomplete")
    assert f"is kept in {where}" in one_line(caught.value)
    assert os.listdir(tmp_path) == [where.name]


@pytest.mark.parametrize(
    "bad", [{"machine": ""}, {"machine": "x" * 300}, {"ram_section_id": 1 << 32}, {"eof_offset": 0}]
)
def test_what_could_not_be_read_again_is_not_committed(tmp_path, memories, bad):
    eof = bad.get("eof_offset", len(kit.STATE))
    facts = replace(kit.FACTS, **{name: bad[name] for name in bad.keys() - {"eof_offset"}})
    with SnapshotWriter(tmp_path / "vm") as writer:
        kit.fill(writer, memories)
        with pytest.raises(SnapshotError, match="kept in"):
            writer.commit(facts, eof_offset=eof)
    assert os.listdir(tmp_path) == ["vm.incomplete"]


def test_forgotten_ones_warn(tmp_path, kept):
    forgotten = [SnapshotWriter(tmp_path / "other")]
    with pytest.warns(ResourceWarning, match="other"):
        forgotten.clear()
    forgotten = [Snapshot.open(kept)]
    with pytest.warns(ResourceWarning, match="unclosed snapshot"):
        forgotten.clear()


def test_no_descriptor_is_left(tmp_path, memories):
    before = sorted(os.listdir("/proc/self/fd"))
    kept = kit.keep(tmp_path / "vm", memories)
    with Snapshot.open(kept) as snapshot:
        snapshot.verify()
    (kept / "manifest.json").write_text("{")
    for call in (lambda: Snapshot.open(kept), lambda: SnapshotWriter(kept)):
        with pytest.raises(SnapshotError):
            call()
    with SnapshotWriter(tmp_path / "other"):
        pass
    assert sorted(os.listdir("/proc/self/fd")) == before
