# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs that are gone, stopped or cut off, in each phase and either role."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import harness
import pytest
from conftest import SharedQemu, prepare
from harness import Qemu, free_port
from harness.wire import Wire, WireProcess
from support import (
    Command,
    Incoming,
    Snapshot,
    assert_survives,
    destination,
    outgoing,
    patience,
    rdma_uri,
    slow_migration,
    wait_for,
)

pytestmark = [pytest.mark.rdma, pytest.mark.qemu, pytest.mark.full]

#: A peer that is gone is noticed within so many seconds.
NOTICED = 15.0
#: A guest that shall run again runs within so many, once its source knows of the failure.
AGAIN = 2.0


# ---- a QEMU is the source ----


@pytest.mark.root
@pytest.mark.parametrize("end", [0, 1], ids=["from us", "from the source"])
def test_source_behind_a_network_that_loses_everything(tmp_path: Path, end: int):
    with (
        WireProcess() as wire,
        # One of its own, since it has the wire's devices open as long as it lives.
        Qemu(machine="q35", guest=SharedQemu.guest, name="source", timeout=patience(60)) as source,
        Incoming(tmp_path / "kept", uri=f"rdma:{Wire.addresses[0]}:0") as incoming,
    ):
        prepare(source)
        slow_migration(source, incoming)
        assert incoming.event("connected")["peer"].startswith(Wire.addresses[1])
        wire.do("drop", end)
        began = time.monotonic()
        line = incoming.fail(1, patience(40))
        assert time.monotonic() - began < NOTICED + patience(2)
        assert "still the source's" in line
        assert Wire.addresses[1] in line
        wire.do("mend")
        # QEMU's own writes have failed meanwhile, or its next ones do.
        assert_survives(source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phase", ["setup", "transfer"])
def test_source_killed(source: Qemu, tmp_path: Path, phase: str):
    with Incoming(tmp_path / "kept") as incoming:
        if phase == "setup":
            source.set_parameter("max-bandwidth", 1)
            source.migrate(incoming.uri)
            incoming.wait_event("progress", phase="setup")
        else:
            slow_migration(source, incoming)
        began = time.monotonic()
        source.signal(signal.SIGKILL)
        line = incoming.fail(1, patience(20))
        assert time.monotonic() - began < NOTICED
    assert "the virtual machine is still the source's" in line
    assert list(tmp_path.iterdir()) == []


def test_incoming_that_fails_leaves_the_guest_running_within_two_seconds(
    source: Qemu, tmp_path: Path
):
    with Incoming(tmp_path / "kept") as incoming:
        slow_migration(source, incoming)
        incoming.signal(signal.SIGTERM)
        incoming.fail(5, patience(20))
        began = time.monotonic()
        source.wait_migration(expect="failed")
        source.wait_status("running")
        assert time.monotonic() - began < patience(AGAIN)
        assert_survives(source)


# ---- a QEMU is the destination ----


def test_destination_that_is_stopped_is_waited_for_and_given_up_if_asked(snapshot: Snapshot):
    uri = rdma_uri(free_port())
    with destination(snapshot, uri) as dest:
        dest.signal(signal.SIGSTOP)
        try:
            with outgoing(snapshot.directory, uri, "--stall-timeout", "3") as sender:
                line = sender.fail(5, patience(30))
        finally:
            dest.signal(signal.SIGCONT)
    # A QEMU accepts by itself, so one that is stopped does not even do that.
    assert "is unchanged" in line
    assert uri.removeprefix("rdma:") in line


def test_destination_that_is_stopped_in_mid_transfer(snapshot: Snapshot):
    uri = rdma_uri(free_port())
    with (
        destination(snapshot, uri) as dest,
        outgoing(snapshot.directory, uri, "--stall-timeout", "4") as sender,
    ):
        sender.wait_event("progress", phase="setup")
        dest.signal(signal.SIGSTOP)
        try:
            sender.wait(patience(30))
            if sender.process.returncode:  # else it was through before the signal came
                line = sender.fail(5)
                assert "--stall-timeout" in line
                assert "is unchanged" in line
        finally:
            dest.signal(signal.SIGCONT)


@pytest.mark.root
def test_destination_behind_a_network_that_loses_everything(snapshot: Snapshot, tmp_path: Path):
    uri = f"rdma:{Wire.addresses[0]}:{free_port()}"
    # It stands still where the wire is cut, or it would be through before that.
    script = Path(harness.__file__).with_name("stopping.py")
    match = json.dumps({"kind": "out", "type": "RAM_BLOCKS_REQUEST"})
    with (
        WireProcess() as wire,
        destination(snapshot, uri) as dest,
        Command(
            "outgoing", snapshot.directory, uri, "--rdma-pin-all", "--trace", tmp_path / "trace",
            prefix=[sys.executable, script, match],
        ) as sender,
    ):  # fmt: skip
        status = Path(f"/proc/{sender.process.pid}/stat")
        wait_for("its stop", lambda: status.read_text().rsplit(")")[-1].split()[0] == "T", 60)
        wire.do("drop", 0)
        sender.signal(signal.SIGCONT)
        began = time.monotonic()
        line = sender.fail(1, patience(40))
        assert time.monotonic() - began < NOTICED + patience(2)
        assert "is unchanged" in line
        assert "has not answered" in line or "its host or process is gone" in line
        wire.do("mend")
        dest.signal(signal.SIGKILL)
        dest.wait_exit()
