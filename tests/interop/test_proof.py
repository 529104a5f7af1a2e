# SPDX-License-Identifier: Apache-2.0
"""``outgoing`` ends in exit status 0 when the destination was seen to be whole, and else never."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import harness
import pytest
from harness import device_address, free_port
from killed import wait_until_stopped
from support import Command, Incoming, Snapshot, destination, outgoing, rdma_uri, same_snapshot

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]

#: Fixtures: short device state, where nothing shows by itself how far a destination came, and long.
KINDS = ["snapshot", pytest.param("long_snapshot", marks=pytest.mark.full)]


def refused(sender: Command, snapshot: Snapshot) -> str:
    """The line of an ``outgoing`` that failed, which has to say that nothing was lost."""
    line = sender.fail(1)
    assert f"the snapshot in {snapshot.directory} is unchanged" in line
    assert not [event for event in sender.events() if event["event"] == "completed"]
    return line


@pytest.mark.parametrize("which", KINDS)
def test_whole_destination_runs_by_itself(which: str, request: pytest.FixtureRequest):
    """The control: what the other tests here have refused is the one thing they change."""
    snapshot = request.getfixturevalue(which)
    uri = rdma_uri(free_port())
    with (
        destination(snapshot, uri) as dest,
        outgoing(snapshot.directory, uri) as sender,
    ):
        done = sender.succeed().event("completed")
        assert "loaded all device state" in done["confirmed"]
        assert dest.wait_status("running") == "running"
        dest.wait_heartbeat(2)


@pytest.mark.parametrize("which", KINDS)
def test_destination_that_lacks_the_last_device_is_no_success(
    which: str, request: pytest.FixtureRequest
):
    """It has received all before the end mark, and of the short one nothing is due behind that."""
    snapshot = request.getfixturevalue(which)
    state = (snapshot.directory / "vmstate.bin").read_bytes()
    assert (len(state) < 32768) == (which == "snapshot")
    assert state.find(b"globalstate") < state.find(b"/pci-serial")
    line = refused_without(snapshot, 1, "pci-serial")
    assert "the destination did not load all device state" in line
    assert "machine, memory and devices" in line


@pytest.mark.full
def test_destination_that_lacks_more_than_the_last_device(long_snapshot: Snapshot):
    """It does not even ask for the last part of the device state."""
    line = refused_without(long_snapshot, 2, "virtio-rng")
    assert "the destination did not load all device state" in line


def refused_without(snapshot: Snapshot, lacks: int, named: str) -> str:
    """The line about a destination without the last devices, which itself names one of them."""
    uri = rdma_uri(free_port())
    with (
        destination(snapshot, uri, devices=snapshot.last_devices[:-lacks]) as dest,
        outgoing(snapshot.directory, uri) as sender,
    ):
        line = refused(sender, snapshot)
        assert dest.wait_exit() == 1
        assert named in dest.stderr()
    return line


@pytest.mark.parametrize("memory", [32, pytest.param(128, marks=pytest.mark.full)])
def test_destination_with_other_ram_is_named(snapshot: Snapshot, memory: int):
    uri = rdma_uri(free_port())
    with (
        destination(snapshot, uri, memory_mib=memory) as dest,
        outgoing(snapshot.directory, uri) as sender,
    ):
        line = refused(sender, snapshot)
        assert dest.wait_exit() == 1
        assert "pc.ram" in dest.stderr()
    assert "the destination did not take the RAM blocks" in line
    assert "pc.ram 65536 KiB" in line


def test_destination_killed_while_it_prepares(snapshot: Snapshot):
    uri = rdma_uri(free_port())
    with (
        destination(snapshot, uri) as dest,
        outgoing(snapshot.directory, uri) as sender,
    ):
        sender.wait_event("progress", phase="setup")
        dest.signal(signal.SIGKILL)
        line = refused(sender, snapshot)
        assert dest.wait_exit() == -signal.SIGKILL
    assert uri.removeprefix("rdma:") in line


def test_destination_killed_in_mid_transfer(snapshot: Snapshot, tmp_path: Path):
    """Right behind the first writes: a fast device is through before a test could see them."""
    uri = rdma_uri(free_port())
    script = Path(harness.__file__).with_name("stopping.py")
    behind = json.dumps({"kind": "write", "block": "RAM block pc.ram"})
    with (
        destination(snapshot, uri) as dest,
        Command(
            "outgoing", snapshot.directory, uri, "--json", "--trace", tmp_path / "trace",
            "--rdma-pin-all", prefix=[sys.executable, script, behind],
        ) as sender,
    ):  # fmt: skip
        wait_until_stopped(sender)
        dest.signal(signal.SIGKILL)
        sender.signal(signal.SIGCONT)
        line = refused(sender, snapshot)
        assert dest.wait_exit() == -signal.SIGKILL
    assert uri.removeprefix("rdma:") in line


def test_snapshot_without_description_goes_on_to_another_disk(snapshot: Snapshot, tmp_path: Path):
    with Incoming(tmp_path / "kept") as incoming, outgoing(snapshot.directory, incoming.uri) as to:
        to.succeed()
        incoming.succeed()
        assert same_snapshot(snapshot.directory, incoming.output) == ""


def test_nobody_listens(snapshot: Snapshot):
    uri = rdma_uri(free_port())
    with outgoing(snapshot.directory, uri) as sender:
        line = refused(sender, snapshot)
    assert f"nobody listens at {uri.removeprefix('rdma:')}" in line


@pytest.mark.full
@pytest.mark.parametrize("incoming", [None, "defer"])
def test_destination_that_does_not_wait_for_a_migration(snapshot: Snapshot, incoming: str | None):
    port = free_port()
    with destination(snapshot, incoming) as dest:
        with outgoing(snapshot.directory, rdma_uri(port)) as sender:
            line = refused(sender, snapshot)
        assert dest.status() == ("inmigrate" if incoming else "running")
    assert f"nobody listens at {device_address()[1]}:{port}" in line
