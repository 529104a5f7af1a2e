# SPDX-License-Identifier: Apache-2.0
"""An end that is killed at one place, and what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from harness import Qemu
from support import RDMA_MIGRATE, Command, Incoming, patience, wait_for

from rdma_mig.snapshot import leftovers


def from_qemu(source: Qemu) -> Callable[[str], None]:
    """How a migration out of this QEMU is begun."""

    def begin(uri: str) -> None:
        source.set_parameter("max-bandwidth", 0)
        source.migrate(uri)

    return begin


def stopped_at(
    match: dict[str, str], begin: Callable[[str], None], kept: Path, sync: str, **more: Any
) -> Incoming:
    """An incoming that stands right behind this record of its trace, or before a call.

    Args:
        match: as harness/stopping.py has it.
        begin: starts a migration to a URI.
        kept: the snapshot directory, beside which the trace is.
        sync: "before" or "after".
        more: of `Incoming`.
    """
    script = Path(harness.__file__).with_name("stopping.py")
    trace = kept.parent / "trace"
    prefix = [*more.pop("prefix", ()), sys.executable, script, json.dumps(match)]
    incoming = Incoming(kept, "--sync", sync, "--trace", str(trace), prefix=prefix, **more)
    try:
        begin(incoming.uri)
        wait_until_stopped(incoming)
    except BaseException:
        incoming.__exit__(None, None, None)
        raise
    return incoming


def wait_until_stopped(command: Command) -> None:
    """Wait until it stands still (harness/stopping.py)."""
    status = Path(f"/proc/{command.process.pid}/stat")
    wait_for("its stop", lambda: status.read_text().rsplit(")")[-1].split()[0] == "T", patience(60))


def kill(incoming: Incoming) -> float:
    """SIGKILL; return when."""
    began = time.monotonic()
    incoming.signal(signal.SIGKILL)
    assert incoming.wait() == -signal.SIGKILL
    return began


def left_behind(kept: Path) -> Path:
    """Wait until nobody works any more on what a killed incoming has left; return where it is."""

    def idle() -> Path | None:
        found = leftovers.find(kept)
        # It may get another name while it is listed, and afterwards.
        if len(found) != 1 or found[0].in_use or not found[0].path.exists():
            return None
        return found[0].path

    return wait_for("the end of all work on it", idle, patience(30))


def rdma_migrate(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    command = [RDMA_MIGRATE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
