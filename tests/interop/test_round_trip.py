# SPDX-License-Identifier: Apache-2.0
"""A guest goes out of a QEMU onto disk, from there onto another disk, and into another QEMU.

One scenario runs all three, with RAM registered at the start and as it is used, on every machine
and with every kind of guest, and compares every byte at each step.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import pytest
from harness import (
    Guest,
    Qemu,
    differences,
    fill_guest,
    free_port,
    guest_counters,
    heartbeats_in,
    read_blocks,
    snapshot_blocks,
)
from harness.files import Buffer
from harness.qemu import FINAL_STATES
from matrix import KINDS, MACHINES, MODES
from support import (
    MIB,
    Incoming,
    Size,
    check_events,
    data_bytes,
    disk_bytes,
    outgoing,
    patience,
    rdma_uri,
    same_snapshot,
    sizes,
)

from rdma_mig.cli.main import main as rdma_migrate

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]

# Rounds that a dirtying guest is made to go through before the migration may end.
ROUNDS = 3


@pytest.mark.deadline(240)
@pytest.mark.parametrize("size", sizes())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("mode", MODES)
def test_guest_goes_out_and_comes_back(
    mode: str,
    machine: str,
    kind: str,
    size: Size,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    pin_all = mode == "pin-all"
    guest = Guest.dirtying(size.dirty) if kind == "dirtying" else Guest.idle()
    paused = kind == "paused"
    first, second = tmp_path / "first", tmp_path / "second"
    port = free_port()

    def qemu(name: str, *, stopped: bool, incoming: str | None = None) -> Qemu:
        # An option ROM is a RAM block. Each end has another one, so that the source's has to come.
        rom = tmp_path / f"{name}.rom"
        rom.write_bytes(b"\x55\xaa" + random.Random(name).randbytes(16384 - 2))
        return Qemu(
            machine=MACHINES[machine].type, memory=MACHINES[machine].blocks(size.memory * MIB),
            guest=guest, name=name, paused=stopped, incoming=incoming,
            extra=["-device", f"e1000,romfile={rom}"], timeout=patience(60),
        )  # fmt: skip

    began = time.monotonic()
    # All are started before any is used: they start beside each other.
    with (
        Incoming(first) as into_first,
        Incoming(second) as into_second,
        qemu("source", stopped=paused) as source,
        qemu("destination", stopped=True, incoming=rdma_uri(port)) as dest,
    ):
        if paused:
            fill_guest(source, seed=size.memory)
        else:
            source.wait_heartbeat(3)
        migrate_out(
            source, into_first, pin_all=pin_all, dirtying=kind == "dirtying",
            dirty=size.dirty * MIB,
        )  # fmt: skip
        done = check_events(into_first.succeed(), time.monotonic() - began, pin_all=pin_all)
        blocks = read_blocks(source)
        check_snapshot(first, blocks, done)
        if kind == "dirtying":
            assert done["rounds"] > 1

        began = time.monotonic()
        with (
            outgoing(first, into_second.uri, pin_all=pin_all) as to_second,
            outgoing(first, rdma_uri(port), pin_all=pin_all) as to_qemu,
        ):
            # In this process: starting another one takes longer than what it does.
            assert rdma_migrate(["inspect", "--verify", str(first)]) == 0
            assert "every byte agrees with its digest" in capsys.readouterr().out
            for sender in (to_qemu, to_second):
                check_events(sender.succeed(), time.monotonic() - began, pin_all=pin_all)
        check_events(into_second.succeed(), time.monotonic() - began, pin_all=pin_all)
        assert into_second.event("completed")["path"] == str(second)
        assert same_snapshot(first, second) == ""
        check_arrived(source, dest, blocks, guest, runs=not paused)


def migrate_out(source: Qemu, into: Incoming, *, pin_all: bool, dirtying: bool, dirty: int) -> None:
    """Migrate, a dirtying guest in several rounds, and leave the source in postmigrate.

    Args:
        source, into: the two ends.
        pin_all: the capability rdma-pin-all.
        dirtying: the guest writes to its memory again and again.
        dirty: bytes that it writes to each time.
    """
    source.set_capability("rdma-pin-all", pin_all)
    # Slow enough for the guest to write between two rounds, however fast the device is.
    source.set_parameter("max-bandwidth", source.memory_size if dirtying else 0)
    if dirtying:
        # No device is fast enough to end within this, so there will be rounds on every one.
        source.set_parameter("downtime-limit", 1)
    source.migrate(into.uri)
    if dirtying:
        looked = source.wait(
            f"{ROUNDS} rounds, or its end", lambda: max(rounds(source) - ROUNDS, 0)
        )
        source.set_parameter("max-bandwidth", 0)
        source.set_parameter("downtime-limit", 60000)
    state = source.wait_migration()
    if dirtying and looked == math.inf:
        # On one processor the guest may not have run when QEMU looked. Then what it has dirtied all
        # the same was sent again by the last round.
        assert state["ram"]["dirty-sync-count"] > 1
        assert state["ram"]["downtime-bytes"] >= dirty
    assert source.wait_status("postmigrate") == "postmigrate"


def rounds(source: Qemu) -> float:
    """How often a migration has looked for dirty pages; infinite when it is over."""
    state = source.query_migrate()
    if state["status"] in FINAL_STATES:
        return math.inf
    return int(state.get("ram", {}).get("dirty-sync-count", 0))


def check_snapshot(directory: Path, blocks: dict[str, Buffer], done: dict[str, object]) -> None:
    """Compare a snapshot with the RAM of the stopped source, and both with what was reported."""
    kept = snapshot_blocks(directory)
    assert differences(blocks, kept) == []
    assert done["path"] == str(directory)
    assert done["bytes"] == sum(len(data) for data in blocks.values())
    assert done["nonzero_bytes"] == data_bytes(blocks)
    assert done["device_state_bytes"] == (directory / "vmstate.bin").stat().st_size
    # Zero pages take no disk; the digests of each block take a page.
    used = disk_bytes(directory / "ram")
    assert used <= data_bytes(blocks) + 8192 * (len(blocks) + 1)


def check_arrived(
    source: Qemu, dest: Qemu, blocks: dict[str, Buffer], guest: Guest, *, runs: bool
) -> None:
    """Compare the destination's RAM with the source's, then let its guest run on."""
    assert dest.wait_migration()["status"] == "completed"
    assert dest.wait_status("paused", "prelaunch") == ("paused" if runs else "prelaunch")
    assert dest.serial() == b""
    assert source.status() == "postmigrate"
    assert differences(blocks, read_blocks(dest)) == []
    if not runs:
        return
    stopped = guest_counters(source.memory(), guest)
    assert guest_counters(dest.memory(), guest) == stopped
    dest.cont()
    dest.wait_heartbeat(3)
    # It may have been stopped within a line: both ends together show that nothing was lost.
    printed = heartbeats_in(source.serial() + dest.serial())
    assert printed == list(range(1, len(printed) + 1))
    dest.stop()
    went_on = guest_counters(dest.memory(), guest)
    assert went_on.passes > stopped.passes
    assert went_on.passes + 1 >= printed[-1]
