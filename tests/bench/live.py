# SPDX-License-Identifier: Apache-2.0
"""How long a guest rests that dirties memory while it migrates: QEMU's, and one of our engine.

Both guests have the same memory, of which they dirty the same part at the same pace (paced.py).
Downtime is seen alike: from when the guest at the source is stopped to when the one at the
destination goes on. Of a QEMU that is its events STOP and RESUME, of our engine when the thread
that writes was held, and when it began to write at the other end.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders import AT_REST, MODES, event_time
from figures import interval
from floor import Floor
from harness import PAGE_SIZE, Qemu, check_counters, device_address, free_port
from live_end import Settings
from paced import MIB, START, PacedGuest, Seen, noise, set_pace
from per_page import row, table

RAM = 512 * MIB
DIRTY = 64 * MIB
#: Of the wire's speed, that memory is dirtied at.
SHARE = 0.5
#: A guest of a QEMU keeps a pace, or not: where the processor is emulated it has little of it.
_KEPT = 0.9
_NO_LIMIT = 10**11
_SECONDS = 300.0
# Seconds in which the pace of a guest is seen.
_WATCH = 1.0
_FLOORS = 3
_END = Path(__file__).with_name("live_end.py")


@dataclass(frozen=True, slots=True)
class Downtime:
    """Of one migration, seconds; and bytes a second.

    Attributes:
        seen: from when the source's guest was stopped to when the destination's went on.
        told: what the source says of it.
        pace: that the guest kept while it migrated.
    """

    seen: float
    told: float
    pace: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast guests are to dirty memory: bytes a second.

    Attributes:
        wire: what the device writes.
        asked: a share of that.
        kept: what a guest of a QEMU makes of it.
    """

    wire: float
    asked: float
    kept: float

    @property
    def agreed(self) -> float:
        """What both guests dirty: what was asked for, unless a QEMU's guest is slower."""
        return self.asked if self.kept >= _KEPT * self.asked else self.kept

    def __str__(self) -> str:
        """As the row calls it."""
        if self.agreed == self.asked:
            return "at half the wire's speed"
        return f"as fast as a QEMU's guest can, at {self.kept / self.wire:.2g} of the wire's speed"


class _Source:
    """A QEMU whose guest dirties memory."""

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu
        with qemu.memory_path.open("r+b") as memory:
            for start, piece in noise(RAM):
                memory.seek(start)
                memory.write(piece)
        qemu.set_capability("events")
        qemu.set_parameter("max-bandwidth", _NO_LIMIT)
        qemu.cont()
        # The first pass is the first touch of all these pages, and slow where that is.
        qemu.wait("the guest's first pass", lambda: Seen.of(qemu).pages > DIRTY // PAGE_SIZE)
        before = self._watch()
        self.cycles = Seen.of(qemu).cycles_a_second(before)

    def _watch(self) -> Seen:
        before = Seen.of(self.qemu)
        time.sleep(_WATCH)
        return before

    def pace(self, asked: float) -> float:
        """Ask for a pace; return the one that it keeps."""
        set_pace(self.qemu, asked, self.cycles)
        time.sleep(_WATCH / 4)  # what it was behind is not part of it
        before = self._watch()
        return Seen.of(self.qemu).pace(before)


@contextlib.contextmanager
def _source(asked: float) -> Iterator[_Source]:
    guest = PacedGuest.dirtying_at(DIRTY, asked)
    with Qemu(
        memory_mib=RAM // MIB, guest=guest, paused=True, name="source", timeout=_SECONDS
    ) as qemu:
        yield _Source(qemu)


def agree(wire: float) -> Pace:
    """Find out how fast the guest of a QEMU can dirty memory; ``wire`` is in bytes a second."""
    asked = SHARE * wire
    with _source(asked) as source:
        return Pace(wire, asked, source.pace(asked))


def qemu_to_qemu(pace: float, *, pin_all: bool, check: bool) -> Downtime:
    """Migrate the guest of a QEMU once.

    Args:
        pace: bytes a second.
        pin_all: register all RAM at the start.
        check: compare the counters in its memory afterwards.
    """
    uri = f"rdma:{device_address()[1]}:{free_port()}"
    with (
        _source(pace) as source,
        Qemu(
            memory_mib=RAM // MIB, guest=source.qemu.guest, incoming=uri,
            name="destination", timeout=_SECONDS,
        ) as into,
    ):  # fmt: skip
        into.set_capability("events")
        source.qemu.set_capability("rdma-pin-all", pin_all)
        time.sleep(AT_REST)
        source.pace(pace)
        before, began = Seen.of(source.qemu), time.time()
        source.qemu.migrate(uri)
        stopped = event_time(source.qemu.wait_event("STOP"))
        resumed = event_time(into.wait_event("RESUME"))
        written = Seen.of(source.qemu).pages - before.pages
        told = source.qemu.wait_migration()["downtime"] / 1e3
        if check:
            into.stop()
            check_counters(into.memory(), START, DIRTY // PAGE_SIZE)
    return Downtime(resumed - stopped, told, written * PAGE_SIZE / (stopped - began))


def ours_to_ours(pace: float, *, pin_all: bool, check: bool) -> Downtime:
    """Migrate a guest of this package's engine once; see `qemu_to_qemu`."""
    settings = json.dumps(
        asdict(Settings(RAM, DIRTY, pace, pin_all, _NO_LIMIT, _SECONDS, check)),
    )
    with _end("incoming", f"rdma:{device_address()[1]}:0", settings) as into:
        uri = _said(into)["uri"]
        time.sleep(AT_REST)
        with _end("outgoing", uri, settings) as out:
            sent, came = _said(out), _said(into)
    return Downtime(came["resumed"] - sent["stopped"], sent["downtime"], sent["pace"])


@contextlib.contextmanager
def _end(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, _END, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _said(end: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what an end says next; its own limits end it when that does not come."""
    assert end.stdout is not None
    line = end.stdout.readline()
    said = json.loads(line) if line else {"error": f"it ended with status {end.wait()}"}
    if "error" in said:
        raise RuntimeError(f"an end of a live migration: {said['error']}")
    return dict(said)


def summary(mode: str, pace: Pace, theirs: list[Downtime], ours: list[Downtime]) -> dict[str, Any]:
    """Return the row of a mode: the median of the rounds' ratios, and the figures behind it."""

    def milliseconds(found: list[Downtime], name: str) -> str:
        return f"{1e3 * statistics.median(getattr(each, name) for each in found):.0f}"

    def paces(found: list[Downtime]) -> str:
        return f"{statistics.median(each.pace for each in found) / 1e6:.0f}"

    ratio = interval([our.seen / their.seen for our, their in zip(ours, theirs, strict=True)])
    found = row(
        f"live source, {DIRTY // MIB} of {RAM // MIB} MiB dirtied {pace}, {mode}: "
        "downtime, of QEMU to QEMU's",
        ratio.median, "x", 1.0,
    )  # fmt: skip
    return found | {
        "detail": f"{milliseconds(ours, 'seen')} ms beside {milliseconds(theirs, 'seen')}; "
        f"[{ratio.low:.3g}, {ratio.high:.3g}]; as the sources tell it "
        f"{milliseconds(ours, 'told')} beside {milliseconds(theirs, 'told')}; dirtied meanwhile at "
        f"{paces(ours)} MB/s beside {paces(theirs)}, of the wire's {pace.wire / 1e6:.0f}",
        "rounds": {
            "qemu": [asdict(each) for each in theirs], "ours": [asdict(each) for each in ours],
        },
    }  # fmt: skip


def measure(
    floor: Floor, modes: Sequence[str], rounds: int, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Return a row for each mode; the contenders take turns, after a warm-up that is checked."""
    wire = RAM / statistics.median(floor.measure(RAM).writes for _ in range(_FLOORS))
    pace = agree(wire)
    rows = []
    for mode in modes:
        found: dict[Callable[..., Downtime], list[Downtime]] = {ours_to_ours: [], qemu_to_qemu: []}
        for number in range(-1, rounds):
            turns = list(found)
            for contender in turns if number % 2 else reversed(turns):
                measured = contender(pace.agreed, pin_all=mode == "pin-all", check=number < 0)
                if number >= 0:
                    found[contender].append(measured)
            if number >= 0:
                theirs, ours = (found[each][-1].seen for each in (qemu_to_qemu, ours_to_ours))
                say(f"live, {mode}, round {number + 1}: downtime {ours:.3f} beside {theirs:.3f}")
        rows.append(summary(mode, pace, found[qemu_to_qemu], found[ours_to_ours]))
    return rows


if __name__ == "__main__":
    with Floor(device_address()[1]) as alone:
        print(table(measure(alone, MODES, int(sys.argv[1]), print)))
