# SPDX-License-Identifier: Apache-2.0
"""The commit point of a real QEMU source without a return path.

On which side of it
`incoming` is killed, or its disk is full, decides who has the machine.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Guest, Qemu, differences, free_port, read_blocks, snapshot_blocks
from harness.output import check_output
from killed import from_qemu, kill, left_behind, rdma_migrate, stopped_at
from support import (
    Command,
    Snapshot,
    assert_survives,
    outgoing,
    patience,
    prompt,
    rdma_uri,
    same_snapshot,
    wait_for,
)

from rdma_mig import _pages

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]

BEFORE = {"kind": "commit", "by": "READY", "state": "before"}
PASSED = {"kind": "commit", "by": "READY", "state": "passed"}
# A QEMU source leaves when it has completed: all has arrived, and nothing has a final name yet.
LEFT = {"kind": "cm", "event": "DISCONNECTED"}


def records(trace: Path) -> list[dict[str, Any]]:
    # A killed process has not made the file end with its content: zeros follow.
    return [json.loads(line) for line in trace.read_text().rstrip("\0").splitlines()]


@pytest.mark.parametrize("sync", ["before", "after"])
def test_killed_just_before_it_the_guest_runs_again_by_itself(
    source: Qemu, tmp_path: Path, sync: str
):
    kept = tmp_path / "kept"
    with stopped_at(BEFORE, from_qemu(source), kept, sync) as incoming:
        # Its monitor answers nothing now: it waits for the READY with its big lock held.
        began = kill(incoming)
        source.wait_status("running")
        took = time.monotonic() - began
        assert_survives(source)
    assert took < prompt(), f"the guest stood still for {took:.2f} s more"
    told = records(tmp_path / "trace")
    assert BEFORE.items() <= told[-1].items()
    last = [record for record in told if record["kind"] in ("in", "out")][-1]
    assert (last["kind"], last["type"]) == ("in", "REGISTER_FINISHED"), "the READY was sent"
    assert (tmp_path / "trace").stat().st_mode & 0o777 == 0o600
    partial = tmp_path / f"kept.partial-{incoming.process.pid}"
    assert set(tmp_path.iterdir()) == {partial, tmp_path / "trace"}
    line = rdma_migrate("recover", partial)
    assert line.returncode == 1
    wanted = "lacks device state: 0 bytes arrived" if sync == "before" else "lacks RAM"
    assert wanted in line.stderr


@pytest.mark.parametrize("sync", ["before", "after"])
def test_killed_when_the_source_has_let_go(tmp_path: Path, sync: str):
    kept = tmp_path / "kept"
    machine = {"machine": "q35", "guest": Guest.dirtying(4), "timeout": patience(60)}
    with Qemu(**machine, name="source") as source:
        source.set_capability("rdma-pin-all")
        source.wait_heartbeat(2)
        with stopped_at(LEFT, from_qemu(source), kept, sync) as incoming:
            kill(incoming)
            left = left_behind(kept)
            said = incoming.stderr
        assert source.wait_status("postmigrate") == "postmigrate"
        if sync == "before":
            assert left == tmp_path / f"kept.partial-{incoming.process.pid}"
        else:
            # RAM was in its memory only, and that is kept by the process which is there for this.
            assert left == tmp_path / "kept.incomplete", said
            assert f"kept whole in {left}" in said
        shown = rdma_migrate("clean", kept, "--remove", "--json").stdout
        listed = check_output("clean", json.loads(shown))
        assert [(each["has_ram"], each["removed"]) for each in listed] == [(True, False)]
        with outgoing(kept, rdma_uri(free_port())) as none:
            assert f"rdma-migrate recover {left}" in none.fail(1)
        found = rdma_migrate("recover", left)
        assert found.returncode == 0, found.stderr
        assert "postmigrate" in found.stdout
        assert set(tmp_path.iterdir()) == {kept, tmp_path / "trace"}
        blocks = read_blocks(source)
        assert differences(blocks, snapshot_blocks(kept)) == []
    port = free_port()
    with (
        Qemu(**machine, name="destination", incoming=rdma_uri(port)) as destination,
        outgoing(kept, rdma_uri(port)) as back,
    ):
        back.succeed()
        destination.wait_status("running")
        destination.wait_heartbeat(2)


@pytest.mark.parametrize("sync", ["before", "after"])
def test_killed_just_behind_it_one_end_has_the_machine(tmp_path: Path, sync: str):
    """Device state takes several messages: the source, which waits for the next READY, goes on."""
    with Qemu(machine="q35", guest=Guest.dirtying(4), timeout=patience(60)) as source:
        source.set_capability("rdma-pin-all")
        source.wait_heartbeat(2)
        with stopped_at(PASSED, from_qemu(source), tmp_path / "kept", sync) as incoming:
            began = kill(incoming)
            source.wait_status("running")
            assert time.monotonic() - began < prompt()
            left = left_behind(tmp_path / "kept")
            said = incoming.stderr
        assert_survives(source)
        assert left == tmp_path / f"kept.partial-{incoming.process.pid}"
        line = rdma_migrate("recover", left)
    assert ("lacks device state" in said) == (sync == "after")
    assert line.returncode == 1
    wanted = "lacks RAM" if sync == "after" else "has all RAM and lacks device state"
    assert wanted in line.stderr
    assert "if it does not run already" in line.stderr


@pytest.mark.parametrize("state", ["before", "passed"])
def test_killed_at_the_word_on_the_return_path(tmp_path: Path, state: str):
    """The snapshot is whole by then, and not called one before the source has let go."""
    kept = tmp_path / "kept"
    with Qemu(machine="q35", guest=Guest.dirtying(4), timeout=patience(60)) as source:
        source.set_capability("rdma-pin-all")
        source.set_capability("postcopy-ram")
        source.wait_heartbeat(2)
        match = {"kind": "commit", "by": "SHUT", "state": state}
        with stopped_at(match, from_qemu(source), kept, "after") as incoming:
            began = kill(incoming)
        if state == "before":
            source.wait_status("running")
            assert time.monotonic() - began < prompt()
            assert_survives(source)
        else:
            assert source.wait_status("postmigrate") == "postmigrate"
        incomplete = tmp_path / "kept.incomplete"
        assert set(tmp_path.iterdir()) == {incomplete, tmp_path / "trace"}
        found = rdma_migrate("recover", incomplete)
        assert found.returncode == 0, found.stderr
        assert set(tmp_path.iterdir()) == {kept, tmp_path / "trace"}
        if state == "passed":
            assert differences(read_blocks(source), snapshot_blocks(kept)) == []
    found = rdma_migrate("inspect", "--verify", kept)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("state", ["before", "passed"])
def test_killed_at_the_final_acknowledgement(snapshot: Snapshot, tmp_path: Path, state: str):
    """Between our own ends: both snapshots are whole, and the source says which one it knows of."""
    kept = tmp_path / "kept"
    match = {"kind": "commit", "by": "FINAL_ACK", "state": state}
    sources: list[Command] = []
    with contextlib.ExitStack() as stack:

        def begin(uri: str) -> None:
            sources.append(stack.enter_context(outgoing(snapshot.directory, uri)))

        with stopped_at(match, begin, kept, "after") as incoming:
            kill(incoming)
        (source,) = sources
        if state == "before":
            assert f"the snapshot in {snapshot.directory} is unchanged" in source.fail(1)
        else:
            source.succeed()
    assert same_snapshot(snapshot.directory, kept) == ""


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


@pytest.mark.root
def test_disk_that_others_fill_behind_it_holds_what_was_set_aside(source: Qemu, tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    script = f'mount -t tmpfs -o size=160m tmpfs {small} && exec "$@"'
    mounted = ["unshare", "-m", "sh", "-c", script, "sh"]
    with stopped_at(BEFORE, from_qemu(source), small / "kept", "after", prefix=mounted) as incoming:
        beside = Path(f"/proc/{incoming.process.pid}/root{small}")
        with pytest.raises(OSError, match="No space left"):
            fill(beside / "filler")
        assert os.statvfs(beside).f_bavail == 0
        incoming.signal(signal.SIGCONT)
        assert incoming.succeed().event("completed")["nonzero_bytes"] > 36 << 20
        assert source.wait_status("postmigrate") == "postmigrate"
        source.cont()


@pytest.fixture
def reserving_nothing(tmp_path: Path) -> Iterator[Path]:
    """A small disk whose file system cannot set space aside: ext4 without extents."""
    image, mounted = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(200 << 20)
    mounted.mkdir()
    without = ["-O", "^extent,^64bit,^has_journal"]
    for command in (
        ["mkfs.ext4", "-q", "-m", "0", *without, str(image)],
        ["mount", "-t", "ext4", "-o", "loop", str(image), str(mounted)],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=patience(30))
    try:
        with (mounted / "tried").open("wb") as file:
            assert _pages.reserve_space(file.fileno(), 0, 4096) == -errno.EOPNOTSUPP
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=patience(30))


@pytest.mark.root
@pytest.mark.parametrize("sync", ["before", "after"])
def test_disk_that_sets_nothing_aside_and_is_full_behind_it(
    source: Qemu, reserving_nothing: Path, sync: str
):
    """What was written stays, and the line says where, and that the source has the machine."""
    disk = reserving_nothing
    with stopped_at(BEFORE, from_qemu(source), disk / "kept", sync) as incoming:
        with pytest.raises(OSError, match="No space left"):
            fill(disk / "filler")
        incoming.signal(signal.SIGCONT)
        line = incoming.fail(1)
        # It has got all, or it failed while it sent its device state, and its guest goes on.
        wait_for("its end", lambda: source.status() in ("postmigrate", "running"), patience(20))
        if source.status() == "postmigrate":
            source.cont()
        source.wait_heartbeat(2)
    kept = disk / "kept.incomplete"
    assert "No space left on device" in line
    assert f"kept in {kept}" in line
    assert "`cont` there resumes it" in line
    assert not (disk / "kept").exists()
    found = rdma_migrate("recover", kept)
    assert found.returncode == 1
    wanted = "lacks device state" if sync == "before" else "lacks RAM"
    assert wanted in found.stderr
