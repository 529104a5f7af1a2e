# SPDX-License-Identifier: Apache-2.0
"""What rdma-migrate prints, where it says that it is ready, and how signals end it.

The ``--json`` events are checked with the round trips.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from harness import Qemu
from support import (
    MIB,
    Incoming,
    Snapshot,
    assert_survives,
    outgoing,
    prompt,
    rdma_uri,
    slow_migration,
    wait_for,
)

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]

BOTH = [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)]


def test_text_is_a_line_when_ready_then_progress_then_a_summary(snapshot: Snapshot, tmp_path: Path):
    kept = tmp_path / "kept"
    with Incoming(kept, text=True) as incoming:
        uri = incoming.uri
        assert re.fullmatch(r"rdma:[0-9.]+:[1-9]\d*", uri)
        # Before anybody connects: a script may wait for this line as well.
        listening = f"listening on {uri}\n"
        wait_for("the line", lambda: incoming.stdout == listening, incoming.timeout)
        with outgoing(snapshot.directory, uri, text=True) as source:
            source.succeed()
            sent, sent_progress = source.stdout.splitlines(), source.stderr.splitlines()
        incoming.succeed()
        received, progress = incoming.stdout.splitlines()[1:], incoming.stderr.splitlines()

    total, nonzero = snapshot.completed["bytes"], snapshot.completed["nonzero_bytes"]
    moved = rf"{total / MIB:.1f} MiB"
    pages = rf"\({total // 4096} pages\)"
    assert re.fullmatch(
        rf"received from [0-9.:]+: {moved} of RAM {pages}, of it {nonzero / MIB:.1f} MiB not zero",
        received[0],
    )
    # What is zero throughout a chunk is not sent to memory of ours, which is zero.
    said = re.fullmatch(
        r"sent to [0-9.:]+: [0-9.]+ MiB \((\d+) pages\) in [1-9]\d* writes", sent[0]
    )
    assert said
    assert nonzero <= int(said[1]) * 4096 < total
    seconds = r"\d+\.\d{3} s"
    for lines, disk, directory in (
        (received, "writing", kept),
        (sent, "loading", snapshot.directory),
    ):
        summary = dict(line.split(None, 1) for line in lines[1:])
        assert summary.keys() == {
            "device", "rounds", "setup", "transfer", disk, "snapshot", "confirmed"
        }  # fmt: skip
        assert summary["rounds"] == "1"
        assert re.fullmatch(seconds, summary["setup"])
        assert re.fullmatch(seconds + r" \([0-9.]+ .iB/s\)", summary["transfer"])
        assert re.fullmatch(seconds, summary[disk])
        assert summary["snapshot"] == str(directory)
        assert "on disk" in summary["confirmed"]
    # Progress goes where it spoils no pipe.
    assert [line for line in progress if line.startswith("preparing memory: ")]
    assert "RAM round 1" in progress
    assert [line for line in sent_progress if line.startswith("writing RAM to the destination: ")]


@pytest.mark.parametrize("number", BOTH)
def test_signal_ends_the_wait_for_a_source(number: signal.Signals, tmp_path: Path):
    with Incoming(tmp_path / "kept", text=True) as incoming:
        assert incoming.uri
        incoming.signal(number)
        assert "cancelled" in incoming.fail(5, prompt())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", BOTH)
def test_signal_in_mid_transfer_leaves_the_guest_to_its_source(
    number: signal.Signals, source: Qemu, tmp_path: Path
):
    with Incoming(tmp_path / "kept") as incoming:
        slow_migration(source, incoming)
        incoming.signal(number)
        line = incoming.fail(5, prompt())
        failed = incoming.events()[-1]
        assert_survives(source)
    assert "cancelled" in line
    assert "still the source's" in line
    assert (failed["event"], failed["exit_status"]) == ("failed", 5)
    assert failed["owner"] in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_outgoing_while_the_destination_is_silent(
    number: signal.Signals, snapshot: Snapshot, tmp_path: Path
):
    with Incoming(tmp_path / "kept") as incoming:
        with outgoing(snapshot.directory, incoming.uri) as source:
            incoming.wait_event("connected")
            incoming.signal(signal.SIGSTOP)
            source.wait_event("connected")
            source.signal(number)
            line = source.fail(5, prompt())
            incoming.signal(signal.SIGCONT)
        assert "cancelled" in line
        assert f"the snapshot in {snapshot.directory} is unchanged" in line
        incoming.fail(1)
    assert list(tmp_path.iterdir()) == []


def test_port_that_is_taken_is_named(tmp_path: Path):
    with Incoming(tmp_path / "first") as incoming:
        uri = incoming.uri
        with Incoming(tmp_path / "second", uri=uri) as second:
            line = second.fail(3)
            assert "listening" not in second.stdout
        assert f"port {uri.rpartition(':')[2]} " in line
        assert " is taken" in line
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("second")] == []


def test_descriptor_that_is_not_open_is_refused_before_anything_is_made(tmp_path: Path):
    with Incoming(tmp_path / "kept", "--ready-fd", "999", uri=rdma_uri(0)) as incoming:
        line = incoming.fail(2)
    assert "--ready-fd 999 is not an open descriptor" in line
    assert list(tmp_path.iterdir()) == []
