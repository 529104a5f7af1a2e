# SPDX-License-Identifier: Apache-2.0
"""The return path with real QEMUs: who has the machine is said, and not only inferred.

QEMU 7.2 opens it when postcopy-ram is on; return-path alone is a trap there.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from harness import Guest, Qemu, differences, fill_random, free_port, read_blocks, snapshot_blocks
from support import MIB, Incoming, assert_survives, outgoing, patience, rdma_uri, wait_for

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]


def running(memory: int = 64, **options: object) -> Qemu:
    """A QEMU whose guest runs, with the capability that opens the return path."""
    qemu = Qemu(
        machine="q35", guest=Guest.dirtying(4), memory_mib=memory, timeout=patience(60), **options
    )
    qemu.set_capability("postcopy-ram")
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
