# SPDX-License-Identifier: Apache-2.0
"""What a migration costs that has next to nothing to move."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import Ours
from per_page import row

from rdma_mig.memory import RamBlock

sys.path.append(str(Path(__file__).resolve().parents[1] / "snapshot"))

import snapshot_kit

MIB = 1 << 20
_SECONDS = 60.0
_COMMAND = Path(__file__).with_name("command.py")


def measure(address: str, rounds: int) -> dict[str, Any]:
    """Send a snapshot with 1 MiB of RAM between two rdma-migrate; the sender's time.

    What its process takes to start, as ``--version`` shows it, is taken off.
    """
    blocks = (RamBlock("pc.ram", MIB),)
    beyond = []
    with tempfile.TemporaryDirectory(prefix="rdma-mig-empty-") as name:
        directory = Path(name)
        with snapshot_kit.guest(blocks) as memories:
            snapshot = snapshot_kit.keep(directory / "kept", memories, blocks)
        for number in range(rounds + 1):
            target = directory / f"arrived-{number}"
            with Ours(
                "incoming", f"rdma:{address}:0", "--output", target, timeout=_SECONDS
            ) as into:
                uri = into.event("listening")["uri"]
                with Ours("outgoing", snapshot, uri, timeout=_SECONDS) as out:
                    took = out.join()
                into.join()
            began = time.monotonic()
            subprocess.run(
                [sys.executable, _COMMAND, "--version"], check=True, stdout=subprocess.DEVNULL
            )
            if number:
                beyond.append(took - (time.monotonic() - began))
    return row(
        "empty migration, beyond the process's start", 1e3 * statistics.median(beyond), "ms", 150
    )
