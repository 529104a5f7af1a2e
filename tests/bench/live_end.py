# SPDX-License-Identifier: Apache-2.0
"""One end of a live migration by this package's engine, of a guest that dirties memory at a pace.

    live_end.py incoming URI SETTINGS
    live_end.py outgoing URI SETTINGS

SETTINGS are `Settings` as JSON. A destination says its URI; then, when its guest writes, when that
was. A source fills RAM, lets its guest write, sends it, and says how it went. Clocks are
CLOCK_MONOTONIC, seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import PAGE_SIZE, check_counters
from paced import START, PacedProcess, noise

import rdma_mig.migration as header
from rdma_mig.errors import MigrationError
from rdma_mig.migration.rdma import RdmaOptions

# Seconds in which a guest's pace is seen.
_WATCH = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What both ends have to know.

    Attributes:
        ram: bytes of memory.
        dirty: how many of them are dirtied.
        pace: bytes a second.
        pin_all: register all RAM at the start.
        bandwidth: limit on what is sent a second, bytes.
        seconds: limit on the migration.
        check: whether the destination compares the counters before its guest goes on.
    """

    ram: int
    dirty: int
    pace: float
    pin_all: bool
    bandwidth: int
    seconds: float
    check: bool


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


class Arriving(PacedProcess):
    """A guest that is looked at, on request, before it goes on."""

    check = False

    def resume(self) -> None:
        """Let it write, if its memory is that of a moment of the guest that was sent."""
        if self.check:
            with self.ram[0].memory.view() as view:
                found = check_counters(view, START, self.pages)
            written = self.seen().written
            if written != found.passes * self.pages + found.cursor:
                raise AssertionError(f"{written} pages were written; memory says {found}")
        super().resume()


def incoming(uri: str, settings: Settings, directory: Path) -> None:
    """Await a guest, let it write, and say since when it does."""
    with Arriving(settings.ram, settings.dirty, settings.pace, directory) as guest:
        guest.check = settings.check
        header.migrate_set_guest(guest)
        tell(uri=str(header.qemu_start_incoming_migration(uri)))
        header.migrate_get_current().migration.wait(settings.seconds)
        while not (seen := guest.seen()).first:
            time.sleep(0.01)
        tell(resumed=seen.first / 1e9)


def outgoing(uri: str, settings: Settings, directory: Path) -> None:
    """Let a guest write and send it; say when it was stopped, and how fast it was."""
    with PacedProcess(settings.ram, settings.dirty, settings.pace, directory) as guest:
        with guest.ram[0].memory.view() as view:
            for start, piece in noise(settings.ram):
                view[start : start + len(piece)] = piece
        guest.resume()
        time.sleep(_WATCH)
        state = header.MigrationState(guest=guest)
        state.enabled_capabilities[header.MigrationCapability.RDMA_PIN_ALL] = settings.pin_all
        state.bandwidth_limit = settings.bandwidth
        before, began = guest.seen().written, time.monotonic()
        header.rdma_start_outgoing_migration(
            state, uri.partition(":")[2], options=RdmaOptions(total_seconds=settings.seconds)
        )
        state.migration.wait(settings.seconds)
        seen = guest.seen()
        stopped = seen.last / 1e9
        tell(
            stopped=stopped,
            downtime=state.downtime / 1e3,
            total=state.total_time / 1e3,
            pace=(seen.written - before) * PAGE_SIZE / (stopped - began),
            last_bytes=state.downtime_bytes,
        )


def main(which: str, uri: str, settings: str) -> int:
    """Be one end; a migration that fails is said in a line of JSON."""
    work = {"incoming": incoming, "outgoing": outgoing}[which]
    with tempfile.TemporaryDirectory(prefix="rdma-mig-paced-") as directory:
        try:
            work(uri, Settings(**json.loads(settings)), Path(directory))
        except MigrationError as error:
            tell(error=str(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
