# SPDX-License-Identifier: Apache-2.0
"""What a process has pinned, and which chunks were asked for: seen from outside of our code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Self

from harness.files import Buffer
from support import MIB

#: Trace events of QEMU: a source asks for a chunk, or a destination is asked for one.
ASKING = "qemu_rdma_write_one_sendreg"
ASKED = "qemu_rdma_registration_handle_register_loop"

_INTERVAL = 0.005


def pinned(pid: int) -> int:
    """Bytes that a process has pinned, as the kernel accounts its memory (VmPin)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmPin:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def registered(pid: int) -> int:
    """Bytes in all memory regions of a process, as the kernel accounts its verbs objects."""
    # A region belongs to the thread that made it.
    threads = {int(name) for name in os.listdir(f"/proc/{pid}/task")}
    shown = subprocess.run(
        ["rdma", "-j", "resource", "show", "mr"], capture_output=True, timeout=60, check=True
    ).stdout
    regions = json.loads(shown or "[]")
    return sum(int(region["mrlen"]) for region in regions if region.get("pid") in threads)


class PinWatch:
    """Watches what a process has pinned and registered, until it ends or the block is left.

    Whenever it has pinned more than before, it is stopped for a closer look. So while it pins it
    cannot get further than an interval between two looks, whoever else uses the processor; and
    while it does not, nothing holds it up.

    Attributes:
        pinned: the most that it had pinned at one time, bytes.
        registered: the most that it had in memory regions at one time, bytes.
    """

    def __init__(self, pid: int) -> None:
        self.pinned = 0
        self.registered = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pin-watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_INTERVAL):
            try:
                if pinned(self._pid) <= self.pinned:
                    continue
                os.kill(self._pid, signal.SIGSTOP)
                try:
                    self._look()
                finally:
                    os.kill(self._pid, signal.SIGCONT)
            except OSError:
                return  # it has come to its end

    def _look(self) -> None:
        now = pinned(self._pid)
        if now > self.pinned:
            self.pinned = now
            self.registered = max(self.registered, registered(self._pid))


def chunks_in_trace(printed: str, event: str) -> int:
    """How many chunks QEMU's trace says were asked for; each of these lines is about one."""
    return sum(line.startswith(event) for line in printed.splitlines())


def chunks_with_data(blocks: dict[str, Buffer]) -> int:
    """How many chunks of 1 MiB, counted from each block's start, hold a byte that is not zero."""
    zeros = bytes(MIB)
    return sum(
        data[start : start + MIB] != zeros[: len(data) - start]
        for data in blocks.values()
        for start in range(0, len(data), MIB)
    )
