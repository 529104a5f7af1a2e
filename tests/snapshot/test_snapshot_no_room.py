# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, small, read-only or simple: real file systems in a mount namespace."""

import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import pytest
import snapshot_kit as kit

from rdma_mig.memory import RamBlock
from rdma_mig.snapshot import room

MIB = 1 << 20

PRELUDE = """
import json, os, resource, sys
from pathlib import Path
import snapshot_kit as kit
from rdma_mig import _pages
from rdma_mig.errors import MigrationError
from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.snapshot import Snapshot, SnapshotWriter

MIB = 1 << 20
base = Path(sys.argv[1])
block = RamBlock("pc.ram", 16 * MIB)
memory = GuestMemory(block.length, "pc.ram")

def data(size):
    with memory.view() as view:
        view[:size] = kit.noise(size)

def keep(reserve=MIB, between=None):
    with SnapshotWriter(base / "vm") as writer:
        writer.write_config(kit.HEAD)
        writer.reserve([(block, memory)], reserve)
        if between:
            between(writer)
        writer.write_ram(0)
        writer.append_device_state(kit.STATE)
        writer.set_description(kit.DESCRIPTION)
        if between:
            between(writer)
        return kit.commit(writer)

def fill_the_rest():
    try:
        with open(base / "filler", "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as error:
        assert error.errno == 28, error
    left = os.statvfs(base)
    assert left.f_bavail * left.f_frsize < MIB // 2, left

def tell(**more):
    print(json.dumps({"left": sorted(os.listdir(base)), **more}))

def failing(run):
    try:
        run()
    except MigrationError as error:
        tell(kind=type(error).__name__, text=str(error))
    else:
        sys.exit("it did not fail")
    memory.close()

def working(run):
    kept = run()
    with Snapshot.open(kept) as snapshot:
        snapshot.verify()
        with GuestMemory(block.length, "copy") as copy:
            snapshot.load_ram(0, copy)
            assert copy.view() == memory.view()
    tell(used=os.stat(kept / "ram/0.raw").st_blocks * 512)
    memory.close()
"""


def run(tmp_path, code, mount=""):
    """Run code in a mount namespace of its own, with ``mount`` done at its ``base``."""
    base = tmp_path / "disk"
    base.mkdir(exist_ok=True)
    script = f'set -e\n{mount.format(base=base)}\nexec "$@"\n'
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    child = subprocess.run(
        [*unshare, "sh", "-c", script, "sh", sys.executable, "-c", PRELUDE + code, base],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=kit.child_environment(),
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    return base, json.loads(child.stdout)


def tmpfs(size):
    return f"mount -t tmpfs -o size={size} tmpfs {{base}}"


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path):
    base, told = run(tmp_path, "data(16 * MIB); failing(keep)", tmpfs("8m"))
    assert told["kind"] == "SnapshotError"
    assert told["left"] == []
    text = told["text"]
    assert f"{base}/vm needs 21." in text, "16 MiB of RAM, 1 of device state, 4 of description"
    assert f"mounted at {base}, and 8.0 MiB are free" in text
    assert "choose a directory elsewhere" in text
    assert "\n" not in text


def test_device_state_needs_room_too(tmp_path):
    _, told = run(tmp_path, "failing(lambda: keep(64 * MIB))", tmpfs("32m"))
    assert "68." in told["text"]
    assert told["left"] == []


def test_zero_pages_need_no_room(tmp_path):
    _, told = run(tmp_path, "data(2 * MIB); working(keep)", tmpfs("10m"))
    assert told["used"] == 2 * MIB
    assert told["left"] == ["vm"]


# As on a block device that has twice the guest's RAM free.
ROOMY = """
import rdma_mig.snapshot.room
rdma_mig.snapshot.room._is_roomy = lambda *_: True
"""
# As where a look at each page takes long: a page of each chunk holds data.
GLANCES = """
import rdma_mig.snapshot.ram
rdma_mig.snapshot.ram._faults_are_slow = lambda part: True
with memory.view() as view:
    for at in range(0, SIZE, MIB):
        view[at] = 1
aside = []
def look(writer):
    [partial] = [name for name in os.listdir(base) if name.startswith("vm.partial-")]
    aside.append(os.stat(base / partial / "ram/0.raw").st_blocks * 512)
"""


def test_what_was_set_aside_at_a_glance_is_given_back(tmp_path):
    code = GLANCES.replace("SIZE", "4 * MIB")
    code += "working(lambda: keep(between=look)); assert aside == [4 * MIB, 4 * 4096], aside"
    _, told = run(tmp_path, code, tmpfs("32m"))
    assert told["used"] == 4 * 4096


def test_room_for_all_is_given_back(tmp_path):
    """As on a block device with room enough: nothing is looked at, and zeros take none at last."""
    code = ROOMY + GLANCES.replace("SIZE", "4 * MIB")
    code += "with memory.view() as view: view[4 * MIB] = 0\n"
    code += "working(lambda: keep(between=look)); assert aside == [5 * MIB, 4 * 4096], aside"
    _, told = run(tmp_path, code, tmpfs("32m"))
    assert told["used"] == 4 * 4096


def test_room_for_all_is_taken_only_where_as_much_is_left(tmp_path):
    """Others write to the disk too. Memory is no disk, and gets what it has to."""
    blocks = [(RamBlock("pc.ram", 8 * MIB), None)]
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for free, device in ((15 * MIB, True), (16 * MIB, True), (1 << 40, False)):
            seen = types.SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
            status = types.SimpleNamespace(st_dev=os.makedev(8 if device else 0, 1))
            with mock.patch.object(os, "fstat", lambda _fd, status=status: status):
                assert room._is_roomy(fd, seen, blocks) is (device and free == 16 * MIB)
    finally:
        os.close(fd)


@pytest.mark.parametrize("first", ["", ROOMY], ids=["a glance", "all"])
def test_where_that_asks_for_too_much_each_page_is_looked_at(tmp_path, first):
    code = first + GLANCES.replace("SIZE", "16 * MIB")
    code += "working(lambda: keep(between=look)); assert aside == [16 * 4096] * 2, aside"
    _, told = run(tmp_path, code, tmpfs("12m"))
    assert told["used"] == 16 * 4096


def test_what_was_set_aside_nobody_else_can_take(tmp_path):
    """The point of it: full to the last block after `reserve`, and still all of it fits."""
    code = "data(6 * MIB); working(lambda: keep(4096, between=lambda writer: fill_the_rest()))"
    _, told = run(tmp_path, code, tmpfs("16m"))
    assert told["left"] == ["filler", "vm"]


@pytest.mark.root
@pytest.mark.full
def test_what_was_set_aside_nobody_else_can_take_on_ext4(tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
    code = "data(6 * MIB); working(lambda: keep(4096, between=lambda writer: fill_the_rest()))"
    _, told = run(tmp_path, code, f"mount -o loop {image} {{base}}")
    assert told["left"] == ["filler", "lost+found", "vm"]


def test_more_device_state_than_was_set_aside_is_kept_as_incomplete(tmp_path):
    code = """
def more(writer):
    fill_the_rest()
    writer.keep_on_failure = True
    for _ in range(8):
        writer.append_device_state(bytes(MIB))
data(MIB)
failing(lambda: keep(between=more))
"""
    base, told = run(tmp_path, code, tmpfs("16m"))
    assert told["left"] == ["filler", "vm.incomplete"]
    assert "vmstate.bin: No space left on device" in told["text"]
    assert f"mounted at {base}" in told["text"]


def test_a_disk_without_inodes(tmp_path):
    _, told = run(tmp_path, "failing(keep)", tmpfs("16m,nr_inodes=3"))
    assert "No space left" in told["text"]
    assert "0 free inodes" in told["text"]
    assert told["left"] == []


def test_a_disk_that_is_read_only(tmp_path):
    _, told = run(tmp_path, "failing(keep)", tmpfs("16m,ro"))
    assert "read-only" in told["text"].lower()


def test_a_file_system_that_sets_nothing_aside_and_knows_no_holes(tmp_path):
    _, told = run(tmp_path, "data(2 * MIB); working(keep)", "mount -t ramfs ramfs {base}")
    assert told["left"] == ["vm"]


def test_a_file_system_that_sets_nothing_aside_is_asked_for_its_free_space(tmp_path):
    code = """
import errno
_pages.allocate_data = _pages.reserve_space = lambda *args: -errno.EOPNOTSUPP
data(SIZE)
"""
    _, told = run(tmp_path, code.replace("SIZE", "16 * MIB") + "failing(keep)", tmpfs("8m"))
    assert "8.0 MiB are free" in told["text"]
    assert told["left"] == []
    _, told = run(tmp_path, code.replace("SIZE", "MIB") + "working(keep)", tmpfs("8m"))
    assert told["left"] == ["vm"]


def test_the_limit_of_file_sizes(tmp_path):
    code = """
data(16 * MIB)
resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))
failing(keep)
"""
    _, told = run(tmp_path, code)
    assert "ulimit -f" in told["text"]
    assert "File too large" in told["text"]
    assert told["left"] == []


UNPRIVILEGED = """
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    os.listdir(base / "closed")
except PermissionError:
    pass
else:
    sys.exit("this user can do anything")
"""


@pytest.mark.root
def test_directories_that_are_not_ours():
    with tempfile.TemporaryDirectory() as name, kit.guest() as memories:
        base = Path(name, "disk")
        base.mkdir()
        for directory in (base.parent, base):
            directory.chmod(0o755)
        (base / "closed").mkdir(0o700)
        kept = kit.keep(base / "kept", memories)
        _, told = run(base.parent, UNPRIVILEGED + "failing(keep)")
        assert f"cannot create {base}/vm.partial-" in told["text"]
        assert "Permission denied" in told["text"]
        assert "uid 65534" in told["text"]
        code = "failing(lambda: Snapshot.open(base / 'kept'))"
        _, told = run(base.parent, UNPRIVILEGED + code)
        assert f"cannot open the snapshot {kept}: Permission denied" in told["text"]
        assert "uid 65534" in told["text"]
