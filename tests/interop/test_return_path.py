# SPDX-License-Identifier: Apache-2.0
"""The return path with real QEMUs: who has the machine is said, and not only inferred.

QEMU 7.2 opens it when postcopy-ram is on; return-path alone is a trap there.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import Guest, Qemu, differences, fill_random, free_port, read_blocks, snapshot_blocks
from support import (
    MIB,
    Incoming,
    Snapshot,
    assert_survives,
    destination,
    outgoing,
    patience,
    rdma_uri,
    same_snapshot,
)

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]


def running(memory: int = 64, **options: object) -> Qemu:
    """A QEMU whose guest runs, with the capability that opens the return path."""
    qemu = Qemu(
        machine="q35", guest=Guest.dirtying(4), memory_mib=memory, timeout=patience(60), **options
    )
    try:
        qemu.set_capability("postcopy-ram")
    except BaseException:
        qemu.close()
        raise
    return qemu


def prepare(qemu: Qemu, start: int = 24, size: int = 36) -> None:
    """Wait for the guest, and give it data that is not zero."""
    qemu.wait_heartbeat(2)
    fill_random(qemu.memory_path, 1, start * MIB, size * MIB)
    qemu.set_parameter("max-bandwidth", 0)


@pytest.mark.parametrize("mode", ["pin-all", "dynamic"])
def test_guest_goes_out_and_comes_back(mode: str, tmp_path: Path):
    kept = tmp_path / "kept"
    with (
        running(name="source") as source,
        running(name="destination", incoming="defer", paused=True) as dest,
    ):
        prepare(source)
        source.set_capability("rdma-pin-all", mode == "pin-all")
        with Incoming(kept) as incoming:
            source.migrate(incoming.uri)
            source.wait_migration()
            assert source.wait_status("postmigrate") == "postmigrate"
            done = incoming.succeed().event("completed")
        assert "on its return path" in done["confirmed"]
        blocks = read_blocks(source)
        assert differences(blocks, snapshot_blocks(kept)) == []

        port = free_port()
        dest.qmp("migrate-incoming", uri=rdma_uri(port))
        with outgoing(kept, rdma_uri(port), "--return-path") as back:
            done = back.succeed().event("completed")
        assert "said on the return path" in done["confirmed"]
        assert dest.wait_migration()["status"] == "completed"
        assert differences(blocks, read_blocks(dest)) == []
        dest.cont()
        dest.wait_heartbeat(2)


def test_between_our_own_ends(snapshot: Snapshot, tmp_path: Path):
    with Incoming(tmp_path / "copy") as into:
        with outgoing(snapshot.directory, into.uri, "--return-path") as out:
            out.succeed()
        assert "return path" in into.succeed().event("completed")["confirmed"]
    assert same_snapshot(snapshot.directory, tmp_path / "copy") == ""


def test_qemu_that_offers_none_is_named(snapshot: Snapshot):
    port = free_port()
    with (
        destination(snapshot, rdma_uri(port)) as dest,
        outgoing(snapshot.directory, rdma_uri(port), "--return-path") as out,
    ):
        line = out.fail(1)
        assert dest.wait_exit(patience(20)) == 1
    assert "took no second connection" in line
    assert "postcopy-ram), or leave --return-path out" in line
    assert f"the snapshot in {snapshot.directory} is unchanged" in line


def test_qemu_that_lacks_a_device_is_no_success(long_snapshot: Snapshot):
    port = free_port()
    devices = long_snapshot.last_devices[:-1]
    with destination(long_snapshot, "defer", devices=devices) as dest:
        dest.set_capability("postcopy-ram")
        dest.qmp("migrate-incoming", uri=rdma_uri(port))
        with outgoing(long_snapshot.directory, rdma_uri(port), "--return-path") as out:
            assert "did not load all device state" in out.fail(1)


def into_the_wait_for_the_last_word(source: Qemu, incoming: Incoming) -> None:
    """Migrate, and stop incoming when all has been received and not yet been written."""
    source.migrate(incoming.uri)
    incoming.wait_event("progress", phase="write")
    incoming.signal(signal.SIGSTOP)
    assert source.query_migrate()["status"] in ("active", "device")
    assert source.status() != "running"


def test_incoming_killed_behind_the_last_byte_leaves_the_guest_to_its_source(tmp_path: Path):
    """Without a return path the source would have completed by then."""
    with running(192, name="source") as source, Incoming(tmp_path / "kept") as incoming:
        prepare(source, 24, 160)
        into_the_wait_for_the_last_word(source, incoming)
        incoming.signal(signal.SIGKILL)
        assert incoming.wait() == -signal.SIGKILL
        assert_survives(source)
    assert [path.name for path in tmp_path.iterdir()] == [f"kept.partial-{incoming.process.pid}"]


def test_migration_cancelled_behind_the_last_byte(tmp_path: Path):
    with running(192, name="source") as source, Incoming(tmp_path / "kept") as incoming:
        prepare(source, 24, 160)
        into_the_wait_for_the_last_word(source, incoming)
        source.qmp("migrate_cancel")
        try:
            assert_survives(source, "cancelled")
        finally:
            incoming.signal(signal.SIGCONT)
        line = incoming.fail(1)
    # The word could no longer be said, or it was said to one who had gone.
    assert "still the source's" in line or "is not known" in line
    assert not (tmp_path / "kept").exists()


def test_return_path_alone_is_a_trap_of_old_qemus_that_is_named(tmp_path: Path):
    with (
        Qemu(guest=Guest.dirtying(4), name="source", timeout=patience(60)) as source,
        Incoming(tmp_path / "kept") as incoming,
    ):
        source.wait_heartbeat(2)
        source.set_capability("return-path")
        source.migrate(incoming.uri)
        assert_survives(source)
        line = incoming.fail(1)
    assert "when its capability return-path is on and postcopy-ram is off" in line
    assert not list(tmp_path.iterdir())
