# SPDX-License-Identifier: Apache-2.0
"""What ``incoming`` leaves when a migration fails under it: a guest at its source, and no DIR."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from harness import Qemu
from support import MIB, Incoming, assert_survives, patience, slow_migration

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]


def test_migration_cancelled_at_the_source(source: Qemu, tmp_path: Path):
    with Incoming(tmp_path / "kept") as incoming:
        slow_migration(source, incoming)
        source.qmp("migrate_cancel")
        line = incoming.fail(1)
        assert_survives(source, "cancelled")
    assert "still the source's" in line
    assert list(tmp_path.iterdir()) == []


def test_incoming_killed_in_mid_transfer_and_started_again(source: Qemu, tmp_path: Path):
    kept = tmp_path / "kept"
    with Incoming(kept) as incoming:
        slow_migration(source, incoming)
        incoming.signal(signal.SIGKILL)
        assert incoming.wait() == -signal.SIGKILL
        partial = tmp_path / f"kept.partial-{incoming.process.pid}"
        assert_survives(source)
    assert list(tmp_path.iterdir()) == [partial]

    source.set_parameter("max-bandwidth", 0)
    with Incoming(kept) as again:
        assert str(partial) in again.wait_event("warning")["message"]
        assert f"rdma-migrate clean --remove {kept}" in again.event("warning")["message"]
        source.migrate(again.uri)
        source.wait_migration()
        again.succeed()
    assert {*tmp_path.iterdir()} == {kept, partial}


@pytest.mark.full
def test_source_killed_in_mid_transfer(source: Qemu, tmp_path: Path):
    with Incoming(tmp_path / "kept") as incoming:
        slow_migration(source, incoming)
        source.signal(signal.SIGKILL)
        line = incoming.fail(1, patience(20))
    assert "awaited was" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize("limit", [["--stall-timeout", "2"], ["--timeout", "4"]])
def test_source_that_falls_silent_is_given_up(source: Qemu, limit: list[str], tmp_path: Path):
    with Incoming(tmp_path / "kept", *limit) as incoming:
        slow_migration(source, incoming)
        source.signal(signal.SIGSTOP)
        try:
            line = incoming.fail(5, patience(20))
        finally:
            source.signal(signal.SIGCONT)
        assert_survives(source)
    assert limit[0] in line
    assert "still the source's" in line
    assert list(tmp_path.iterdir()) == []


def test_directory_that_exists_is_refused_before_listening(tmp_path: Path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("of another")
    with Incoming(kept, text=True) as incoming:
        line = incoming.fail(1)
        assert incoming.stdout == ""
    assert f"{kept} already exists" in line
    assert "choose another directory" in line
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "precious").read_text() == "of another"


@pytest.mark.root
def test_disk_that_is_full_leaves_the_guest_to_its_source(source: Qemu, tmp_path: Path):
    """The source must not be allowed to complete before the disk has room for everything."""
    small = tmp_path / "small"
    small.mkdir()
    # A mount of its own, in a namespace of its own: it is gone with the process.
    script = f'mount -t tmpfs -o size=24m tmpfs {small} && exec "$@"'
    mounted = ["unshare", "-m", "sh", "-c", script, "sh"]
    with Incoming(small / "kept", prefix=mounted) as incoming:
        uri = incoming.uri
        beside = Path(f"/proc/{incoming.process.pid}/root{small}")
        assert os.statvfs(beside).f_blocks * os.statvfs(beside).f_frsize == 24 * MIB
        source.set_parameter("max-bandwidth", 0)
        source.migrate(uri)
        line = incoming.fail(1)
        assert_survives(source)
    found = re.search(r"needs ([0-9.]+) MiB for RAM and device state", line)
    assert found
    assert 36 + 64 < float(found[1]) < 128
    assert f"mounted at {small}, and 2" in line
    assert "MiB are free" in line
    assert "still the source's" in line
