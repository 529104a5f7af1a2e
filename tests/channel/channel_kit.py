# SPDX-License-Identifier: Apache-2.0
"""A guest that proves its RAM, sent and received over plain channels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness import Guest, Qemu, guest_counters
from harness.files import FileBytes
from support import Command

GUEST = Guest.dirtying(4)


class Stored(NamedTuple):
    """A machine as it left a QEMU."""

    directory: Path
    stream: Path
    memory: bytes


def leave(source: Qemu, directory: Path) -> Stored:
    """Let a machine leave a QEMU into a file, and make a snapshot of that."""
    stream, snapshot = directory / "stream", directory / "snapshot"
    source.migrate(f"exec:cat > {stream}")
    source.wait_migration()
    with Command("incoming", f"file:{stream}", "--output", snapshot) as command:
        command.succeed()
    return Stored(snapshot, stream, bytes(source.memory()[:]))


def assert_same_memory(snapshot: Path, memory: bytes) -> None:
    """Check that the snapshot's main RAM is what the source had when it was stopped."""
    guest_counters(FileBytes(snapshot / "ram" / "0.raw"), GUEST)
    assert (snapshot / "ram" / "0.raw").read_bytes() == memory


def assert_runs_on(destination: Qemu) -> None:
    """Check that the guest runs in a QEMU, with counters that no lost page could show."""
    destination.wait_migration()
    destination.wait_status("running")
    destination.wait_heartbeat(3)
    destination.stop()
    assert guest_counters(destination.memory(), GUEST).passes > 0


def through_shell(redirection: str) -> list[str]:
    """Return a prefix that starts a command with a descriptor opened by the shell."""
    return ["/bin/sh", "-c", f'exec {redirection}; exec "$@"', "sh"]
