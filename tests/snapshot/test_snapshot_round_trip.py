# SPDX-License-Identifier: Apache-2.0
"""What is kept comes back, takes no more disk than it must, and is the same each time."""

import hashlib
import json
import os
import re
import stat
import subprocess
import sys

import pytest
import snapshot_kit as kit
import xxhash

from rdma_mig.errors import MigrationCancelled, SnapshotError
from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.snapshot import Snapshot, SnapshotWriter, room

MIB = 1 << 20


def test_all_of_it_comes_back(kept, memories):
    with Snapshot.open(kept) as snapshot:
        assert snapshot.machine == "pc-q35-7.2"
        assert snapshot.blocks == kit.BLOCKS
        assert snapshot.config == kit.HEAD
        assert snapshot.device_state.startswith(kit.STATE)
        assert snapshot.device_state.endswith(kit.DESCRIPTION)
        assert snapshot.eof_offset == len(kit.STATE)
        assert snapshot.description == kit.DESCRIPTION
        assert snapshot.manifest.footers is True
        assert snapshot.manifest.ram_section_id == 2
        snapshot.verify()
        for index, source in enumerate(memories):
            for verify in (True, False):
                told = []
                with GuestMemory(source.length, "copy") as copy:
                    read = snapshot.load_ram(index, copy, verify=verify, progress=told.append)
                    assert sum(told) == read
                    if index == 2:
                        assert read == 0
                        assert os.fstat(copy.fd).st_blocks == 0, "zeros were allocated"
                    assert copy.view() == source.view()


def test_modes_and_names(kept):
    names = {}
    for base, directories, files in os.walk(kept):
        for name in directories:
            names[os.path.join(base, name)] = 0o700
        for name in files:
            names[os.path.join(base, name)] = 0o600
    names[str(kept)] = 0o700
    assert {
        path: stat.S_IMODE(os.stat(path, follow_symlinks=False).st_mode) for path in names
    } == names
    assert sorted(os.path.relpath(path, kept) for path in names) == sorted(
        [".", "manifest.json", "config.bin", "vmstate.bin", "vmdesc.json", "ram"]
        + [f"ram/{n}.{kind}" for n in range(3) for kind in ("raw", "xxh3")]
    )
    assert os.listdir(kept.parent) == ["vm"]


def test_zero_pages_take_no_disk(tmp_path):
    block = RamBlock("pc.ram", 64 * MIB)
    with GuestMemory(block.length, "pc.ram") as memory:
        with memory.view() as view:
            # Every other page of 8 MiB: holes of one page must stay holes.
            for at in range(0, 8 * MIB, 8192):
                view[at + 17] = 1
        kept = kit.keep(tmp_path / "vm", [memory], (block,))
    status = os.stat(kept / "ram/0.raw")
    assert status.st_size == 64 * MIB
    # A file system may need a block of its own for the list of so many extents.
    assert 4 * MIB <= status.st_blocks * 512 <= 4 * MIB + 256 * 1024
    assert os.stat(kept / "vmstate.bin").st_blocks * 512 <= 8192, "the reserve was kept"
    assert os.stat(kept / "manifest.json").st_blocks * 512 <= 8192
    assert os.stat(kept / "vmdesc.json").st_blocks * 512 <= 8192
    with Snapshot.open(kept) as snapshot:
        assert snapshot.manifest.blocks[0].data_bytes == 4 * MIB
        snapshot.verify()


def test_two_snapshots_of_the_same_bytes_are_equal(kept, memories, tmp_path):
    other = kit.keep(tmp_path / "other", memories)
    subprocess.run(["diff", "-r", kept, other], check=True)
    manifest = (kept / "manifest.json").read_text("ascii")
    content = json.loads(manifest)
    assert manifest == json.dumps(content, indent=2, sort_keys=True) + "\n"
    assert not {"time", "date", "host"} & set(re.findall(r"\w+", manifest))


def test_memory_that_is_slow_to_touch_is_read_and_comes_out_the_same(
    kept, memories, tmp_path, monkeypatch
):
    """In a machine whose page faults are slow RAM is copied first; here that is made to happen."""
    read = []
    preadv = os.preadv
    monkeypatch.setattr("rdma_mig.snapshot.ram._SLOW_FAULT", 0.0)
    monkeypatch.setattr(os, "preadv", lambda *what: read.append(preadv(*what)) or read[-1])
    other = kit.keep(tmp_path / "other", memories)
    assert read
    for path in sorted(kept.rglob("*")):
        if path.is_file():
            assert (other / path.relative_to(kept)).read_bytes() == path.read_bytes()


def test_digests_can_be_checked_by_hand(kept):
    """What the manifest's page says, done with nothing of ours."""
    manifest = json.loads((kept / "manifest.json").read_bytes())
    for index, block in enumerate(manifest["blocks"]):
        raw = (kept / block["file"]).read_bytes()
        assert len(raw) == block["length"] == kit.BLOCKS[index].length
        chunks = [raw[at : at + MIB] for at in range(0, len(raw), MIB)]
        digests = b"".join(
            xxhash.xxh3_128(chunk).digest() if any(chunk) else bytes(16) for chunk in chunks
        )
        assert (kept / block["digests"]["file"]).read_bytes() == digests
        assert hashlib.sha256(digests).hexdigest() == block["digests"]["sha256"]
    for name, record in manifest["files"].items():
        raw = (kept / name).read_bytes()
        assert len(raw) == record["size"]
        assert hashlib.sha256(raw).hexdigest() == record["sha256"]


def test_digest_windows(tmp_path):
    """More than 4096 chunks, data in the first, at the window's edge, and at the end."""
    block = RamBlock("pc.ram", 9000 * MIB + 5)
    marks = (0, 4095 * MIB + 5, 4096 * MIB, 8192 * MIB - 1, 9000 * MIB + 4)
    with GuestMemory(block.length, "pc.ram") as memory, memory.view() as view:
        for mark in marks:
            view[mark] = 1
        kept = kit.keep(tmp_path / "vm", [memory], (block,))
        digests = (kept / "ram/0.xxh3").read_bytes()
        assert len(digests) == 9001 * 16
        found = [at for at in range(9001) if any(digests[16 * at : 16 * at + 16])]
        assert found == [mark // MIB for mark in marks]
        with Snapshot.open(kept) as snapshot, GuestMemory(block.length, "x") as copy:
            snapshot.verify()
            assert snapshot.load_ram(0, copy) == snapshot.manifest.blocks[0].data_bytes
            assert [copy.view()[mark] for mark in marks] == [1] * 5


def test_without_a_description(tmp_path, memories):
    kept = kit.keep(tmp_path / "vm", memories, description=None)
    assert not (kept / "vmdesc.json").exists()
    with Snapshot.open(kept) as snapshot:
        assert snapshot.description is None
        assert snapshot.device_state == kit.STATE
        snapshot.verify()


def test_populated_memory_can_be_loaded_and_used_memory_cannot(kept, memories):
    with Snapshot.open(kept) as snapshot, GuestMemory(kit.BLOCKS[0].length, "x") as copy:
        copy.populate()
        snapshot.load_ram(0, copy)
        assert copy.view() == memories[0].view()
        with pytest.raises(ValueError, match="not zero"):
            snapshot.load_ram(0, copy)
        with GuestMemory(MIB, "x") as small, pytest.raises(ValueError, match="longer"):
            snapshot.load_ram(0, small)


@pytest.mark.parametrize("step", ["reserve", "write_ram", "load_ram", "verify"])
def test_every_long_step_can_be_cancelled(step, tmp_path, memories, kept):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 2

    pairs = list(zip(kit.BLOCKS, memories, strict=True))

    def run():
        if step in ("reserve", "write_ram"):
            with SnapshotWriter(tmp_path / "other") as writer:
                writer.write_config(kit.HEAD)
                writer.reserve(pairs, MIB, stop if step == "reserve" else None)
                writer.write_ram(0, stop)
        with Snapshot.open(kept) as snapshot, GuestMemory(kit.BLOCKS[0].length, "x") as copy:
            if step == "load_ram":
                snapshot.load_ram(0, copy, stop)
            snapshot.verify(stop)

    with pytest.raises(MigrationCancelled, match=r"pc\.ram"):
        run()
    assert len(asked) == 2
    assert sorted(os.listdir(tmp_path)) == ["vm"]


@pytest.mark.parametrize("roomy", [False, True])
def test_progress_adds_up(tmp_path, memories, monkeypatch, roomy):
    """What is told of adds up to what was set aside, be it for all chunks or for data alone."""
    monkeypatch.setattr(room, "_is_roomy", lambda *_: roomy)
    told = []
    with SnapshotWriter(tmp_path / "vm") as writer:
        writer.write_config(kit.HEAD)
        reserved = writer.reserve(list(zip(kit.BLOCKS, memories, strict=True)), MIB)
        written = sum(writer.write_ram(index, progress=told.append) for index in range(3))
    assert reserved == sum(told)
    assert written == MIB + 3 * 4096 + 100_000
    assert (reserved > written) is roomy


def test_device_state_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("rdma_mig.snapshot.writer.MAX_DEVICE_STATE", 1000)
    with SnapshotWriter(tmp_path / "vm") as writer:
        writer.append_device_state(bytes(1000))
        with pytest.raises(SnapshotError, match="device state"):
            writer.append_device_state(b"x")
        with pytest.raises(SnapshotError, match="head of the stream"):
            writer.write_config(bytes((16 << 20) + 1))


def test_misuse_is_not_called_a_snapshot(tmp_path, memories):
    def too_early():
        with SnapshotWriter(tmp_path / "vm") as writer:
            writer.write_config(kit.HEAD)
            kit.commit(writer)

    with pytest.raises(RuntimeError, match="before"):
        too_early()
    assert os.listdir(tmp_path) == ["vm.incomplete"]
    with SnapshotWriter(tmp_path / "vm") as writer:
        writer.write_config(kit.HEAD)
        writer.reserve(list(zip(kit.BLOCKS, memories, strict=True)), MIB)
        with pytest.raises(RuntimeError, match="already"):
            writer.reserve(list(zip(kit.BLOCKS, memories, strict=True)), MIB)
    assert os.listdir(tmp_path) == ["vm.incomplete"]


PEAK = """
import sys
import snapshot_kit as kit
from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.snapshot import Snapshot

def peak():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) for l in status if l.startswith("VmHWM")) * 1024

path, what = sys.argv[1:]
block = RamBlock("pc.ram", 256 << 20)
with GuestMemory(block.length, "pc.ram") as memory:
    if what == "write":
        memory.populate()
        tile = kit.noise(1 << 20)
        with memory.view() as view:
            for at in range(0, 256 << 20, 1 << 20):
                view[at : at + (1 << 20)] = tile
        before = peak()
        kit.keep(path, [memory], (block,))
    else:
        with Snapshot.open(path) as snapshot:
            before = peak()
            if what == "load":
                snapshot.load_ram(0, memory)
            else:
                snapshot.verify()
    print(peak() - before)
"""


def test_nothing_holds_ram_beside_the_guests_memory(tmp_path):
    extra = {}
    for what in ("write", "load", "verify"):
        child = subprocess.run(
            [sys.executable, "-c", PEAK, tmp_path / "vm", what],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
            env=kit.child_environment(),
        )
        extra[what] = int(child.stdout) / MIB
    assert extra["write"] < 8
    # The guest's memory is filled, and not mapped yet.
    assert extra["load"] < 8
    assert extra["verify"] < 8
