# SPDX-License-Identifier: Apache-2.0
"""A real QEMU takes the stream in messages of any size, and one connection for RAM."""

from __future__ import annotations

import pytest
from harness import Qemu, free_port
from support import Snapshot, patience, rdma_uri

from rdma_mig.migration.events import Completed, Connected, MigrationEvent
from rdma_mig.migration.rdma import RdmaOptions, rdma_start_outgoing_migration
from rdma_mig.migration.send import SnapshotSource
from rdma_mig.migration.state import Migration
from rdma_mig.snapshot import Snapshot as Directory

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]


@pytest.mark.deadline(240)
def test_qemu_takes_the_stream_in_messages_of_any_size(long_snapshot: Snapshot):
    """Few bytes at a time, more than QEMU's buffer, and all of the device state in one."""
    for size in (61, 33000, 524272):
        events: list[MigrationEvent] = []
        uri = rdma_uri(free_port())
        with Directory.open(long_snapshot.directory) as directory:
            extra = [word for device in long_snapshot.last_devices for word in ("-device", device)]
            with (
                Qemu(**long_snapshot.machine, name="dest", incoming=uri, extra=extra) as dest,
                Migration(events.append) as migration,
            ):
                source = SnapshotSource(directory)
                try:
                    source.load(migration)
                    rdma_start_outgoing_migration(
                        migration, uri, ram=source.ram, save=source.save,
                        options=RdmaOptions(stream_message=size, connections=3),
                    )  # fmt: skip
                    assert migration.wait(patience(60))
                finally:
                    migration.close()
                    source.close()
                assert [e.connections for e in events if isinstance(e, Connected)] == [1]
                assert any("1 of 3 connections" in str(getattr(e, "message", "")) for e in events)
                assert isinstance(events[-1], Completed)
                assert "loaded all device state" in events[-1].confirmed
                assert dest.wait_migration()["status"] == "completed"
                dest.wait_status("running")
                dest.wait_heartbeat(2)
