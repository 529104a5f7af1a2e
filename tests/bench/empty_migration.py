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

from contenders import AT_REST, Ours
from per_page import row

from rdma_mig.memory import RamBlock

sys.path.append(str(Path(__file__).resolve().parents[1] / "snapshot"))

import snapshot_kit

MIB = 1 << 20
_SECONDS = 60.0
# Not command.py, which loads most of what a migration needs before it reads its arguments.
_COMMAND = Path(sys.executable).with_name("rdma-migrate")


def measure(address: str, rounds: int) -> dict[str, Any]:
    """Send a snapshot with 1 MiB of RAM between two rdma-migrate; the sender's time.

    What its process takes to start, as ``--version`` shows it, is taken off: loading what a
    migration needs, pyverbs included, is not. The destination is at rest by then, as one is that
    was not started in the same instant.
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
                "incoming", f"rdma:{address}:0", "--output", target,
                timeout=_SECONDS, script=_COMMAND,
            ) as into:  # fmt: skip
                uri = into.event("listening")["uri"]
                time.sleep(AT_REST)
                with Ours("outgoing", snapshot, uri, timeout=_SECONDS, script=_COMMAND) as out:
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
