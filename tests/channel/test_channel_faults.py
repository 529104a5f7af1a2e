# SPDX-License-Identifier: Apache-2.0
"""What fails on the way without RDMA: when, in which line, and who has the machine."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from channel_kit import GUEST, Stored
from harness import Qemu
from support import Command, Incoming


def test_command_that_fails_behind_a_whole_stream_is_no_success(tmp_path: Path, stored: Stored):
    """A command that unpacks may notice only at its end that what it printed is wrong."""
    with Incoming(tmp_path / "kept", uri=f"exec:cat {stored.stream}; exit 3") as incoming:
        assert "ended with status 3" in incoming.fail(1)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("command", ["cat > /dev/null; exit 3", "exit 3"])
def test_command_that_did_not_take_it_is_no_success(stored: Stored, command: str):
    with Command("outgoing", stored.directory, f"exec:{command}") as outgoing:
        said = outgoing.fail(1)
    assert "ended with status 3" in said
    assert "is unchanged" in said


def test_source_that_does_not_come_is_waited_for_as_long_as_was_said(tmp_path: Path):
    uri = f"unix:{tmp_path}/socket"
    with Incoming(tmp_path / "kept", "--accept-timeout", "0.5", uri=uri) as incoming:
        said = incoming.fail(5)
        assert incoming.event("failed")["remedy"].endswith("--accept-timeout")
    assert f"a source did not connect to {uri} within 0.5 s" in said
    assert "goes on running there" in said
    assert list(tmp_path.iterdir()) == []


def test_file_that_was_not_finished_is_not_there(tmp_path: Path, stored: Stored):
    with Command(
        "outgoing", stored.directory, f"file:{tmp_path}/stream",
        prefix=["/bin/sh", "-c", 'trap "" XFSZ; ulimit -f 1000; exec "$@"', "sh"],
    ) as outgoing:  # fmt: skip
        assert "File too large" in outgoing.fail(3)
    assert list(tmp_path.iterdir()) == []


def test_destination_that_fails_leaves_the_guest_to_a_source_that_listens(tmp_path: Path):
    uri = f"unix:{tmp_path}/socket"
    with (
        Qemu(guest=GUEST, name="source") as source,
        Incoming(tmp_path / "kept", "--max-ram", "32M", uri=uri) as incoming,
    ):
        source.set_capability("return-path")
        source.wait_heartbeat(2)
        source.migrate(incoming.uri)
        assert "--max-ram" in incoming.fail(3)
        source.wait_migration(expect="failed")
        assert source.status() == "running"
        source.wait_heartbeat(2)
    assert list(tmp_path.iterdir()) == []


def test_signal_while_waiting_removes_the_socket(tmp_path: Path):
    with Incoming(tmp_path / "kept", uri=f"unix:{tmp_path}/socket") as incoming:
        assert incoming.uri
        incoming.signal(signal.SIGTERM)
        incoming.fail(5)
    assert list(tmp_path.iterdir()) == []


def test_nobody_listens(tmp_path: Path, stored: Stored):
    with Command("outgoing", stored.directory, f"unix:{tmp_path}/socket") as outgoing:
        assert "check that the destination listens" in outgoing.fail(1)


@pytest.mark.parametrize(
    ("uri", "option"),
    [("file:x", "--return-path"), ("unix:x", "--rdma-pin-all"), ("exec:x", "--rdma-device=rxe0")],
)
def test_option_that_does_not_fit_is_refused(stored: Stored, uri: str, option: str):
    with Command("outgoing", stored.directory, uri, option) as outgoing:
        outgoing.fail(2)


def test_bytes_that_come_behind_the_end_are_refused(tmp_path: Path, stored: Stored):
    """Behind a pause, so that the end was seen before they came."""
    uri = f"exec:cat {stored.stream}; sleep 1; echo more"
    with Incoming(tmp_path / "kept", uri=uri) as incoming:
        assert "behind the end of the stream" in incoming.fail(4)
    assert not (tmp_path / "kept").exists()
