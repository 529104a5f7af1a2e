# SPDX-License-Identifier: Apache-2.0
"""Many migrations in one process, half of them failing at random steps; what is left of them.

    rdma_soak.py [--runs N] [--seed S] [--json]

The peers are raw ones, in threads of this process and over the device. Every run has a seed of its
own, which the report of a failure names: ``--runs 1 --seed S`` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]

import rdma_kit as kit  # noqa: E402
import snapshot_kit  # noqa: E402

from rdma_mig.errors import MigrationError  # noqa: E402
from rdma_mig.wire.control import ControlMessage, ControlType  # noqa: E402

DYNAMIC = b"\0\0\0\1\0\0\0\0"
#: A run that takes longer than this, seconds, hangs: none of its waits is as long.
HANG = 20.0
#: Runs before the first look at what is there: libraries keep things from their first use on.
WARM_UP = 20


@dataclass
class Report:
    """What a soak has found.

    Attributes:
        runs: migrations.
        completed, failed: how they ended; ``failed`` are those that were made to.
        wrong: runs that ended otherwise than they had to.
        hangs: runs that did not end in time.
        leaks: kinds of resources of which there are more than after the warm-up, and how many.
        grown_kib: memory, resident, after the last run less that after the warm-up.
        grown_late_kib: how much more the least of the last quarter of the runs is than the least
            of the second one: allocators take some at first, and more or less from one run to the
            next; a leak goes on.
        seconds: what all took.
    """

    runs: int = 0
    completed: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leaks: dict[str, int] = field(default_factory=dict)
    grown_kib: int = 0
    grown_late_kib: int = 0
    seconds: float = 0.0

    @property
    def most_late_kib(self) -> int:
        """How much memory may grow in the second half: 1 KiB a run, two steps of an allocator."""
        return 2048 + self.runs // 2

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        found = self.wrong or self.hangs or self.leaks
        return not found and self.grown_late_kib <= self.most_late_kib


def resident_kib() -> int:
    """Resident memory that is in use: what allocators keep of it for later is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def traces(room: Path) -> dict[str, int]:
    """Everything that a migration could leave, counted."""
    gc.collect()
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(path))
    return {
        **kit.resources(),
        "descriptor": len(links),
        "memfd": sum(link.startswith("/memfd:") for link in links),
        "thread": threading.active_count(),
        "file": sum(1 for _ in room.rglob("*")),
    }


# ---- faults: what a peer does instead of its next step ----


def leave(peer: kit.Peer, _end: kit.End) -> None:
    peer.close()


def say_error(peer: kit.Peer, _end: kit.End) -> None:
    peer.send(ControlMessage(ControlType.ERROR), wait=False)


def say_nonsense(peer: kit.Peer, _end: kit.End) -> None:
    peer.send(b"\xff" * 40, wait=False)


def fall_silent(_peer: kit.Peer, _end: kit.End) -> None:
    pass


def be_cancelled(_peer: kit.Peer, end: kit.End) -> None:
    end.migration.cancel()


Fault = Callable[[kit.Peer, kit.End], None]
FAULTS: list[Fault] = [leave, say_error, say_nonsense, fall_silent, be_cancelled]


def one(number: int, seed: int, kept: Path, room: Path) -> tuple[str, bool, MigrationError | None]:
    """One migration; return what was done, whether it had to complete, and its error."""
    choice = random.Random(seed)
    fault = choice.choice(FAULTS) if choice.random() < 0.5 else None
    private_data = choice.choice([kit.PLAIN, DYNAMIC]) if number % 2 else kit.PLAIN
    options = {"stall_seconds": 0.3} if fault is fall_silent else {}
    if number % 2:
        step = choice.choice(kit.SOURCE_STEPS[:-1])
        what = f"seed {seed}: incoming, a source that does {_name(fault)} behind {step!r}"
        output = room / "vm"
        with kit.incoming(output, **options) as end, kit.dial(end.uri, private_data) as peer:
            steps = kit.act_as_source(peer)
            with contextlib.suppress(MigrationError, AssertionError):
                if private_data is DYNAMIC:
                    # Keys of chunks, not of blocks: this raw source does not ask for them.
                    step = choice.choice(kit.SOURCE_STEPS[:5])
                    fault = fault or leave
                kit.until(step if fault else kit.SOURCE_STEPS[-1], steps)
                if fault:
                    fault(peer, end)
                else:
                    peer.close()
            error = ended(end)
        return what, fault is None, error
    step = choice.choice(kit.DESTINATION_STEPS[:-1])
    what = f"seed {seed}: outgoing, a destination that does {_name(fault)} behind {step!r}"
    with kit.RawListener() as listener:

        def work() -> None:
            peer = listener.accept(private_data, 60)
            kit.until(step if fault else kit.DESTINATION_STEPS[-1], kit.act_as_destination(peer))
            began.set()
            if not fault:
                peer.close()

        began = threading.Event()
        worker = kit.Worker(work)
        with kit.outgoing(kept, listener.uri, **options) as end:
            began.wait(HANG)
            if fault and listener.peer is not None:
                with contextlib.suppress(MigrationError, OSError):
                    fault(listener.peer, end)
            error = ended(end)
        with contextlib.suppress(MigrationError, AssertionError, OSError):
            worker.result()
    return what, fault is None, error


def _name(fault: Fault | None) -> str:
    return "nothing wrong" if fault is None else fault.__name__


class Hangs(Exception):
    """A migration did not end in time."""


def ended(end: kit.End) -> MigrationError | None:
    try:
        if not end.migration.wait(kit.patience(HANG)):
            raise Hangs
    except MigrationError as error:
        return error
    return None


def clear(room: Path) -> None:
    import shutil

    for path in room.iterdir():
        shutil.rmtree(path)


Trial = Callable[[int, int, Path, Path], tuple[str, bool | None, MigrationError | None]]


def soak(
    runs: int,
    seed: int,
    progress: Callable[[Report], None] | None = None,
    trial: Trial = one,
) -> Report:
    """Run that many migrations after the warm-up.

    ``trial`` gets a number, a seed, a snapshot to send and an empty directory. It returns what it
    did, whether the migration had to complete (None where it may do either), and its error.
    """
    report = Report()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory, "room")
        room.mkdir()
        with snapshot_kit.guest(kit.BLOCKS) as memories:
            kit.paint(memories)
            kept = snapshot_kit.keep(Path(directory, "kept"), memories, kit.BLOCKS)
        before: dict[str, int] = {}
        memory = 0
        resident: list[int] = []
        for number in range(runs + WARM_UP):
            if number == WARM_UP:
                before, memory = traces(room), resident_kib()
            if (number - WARM_UP) % max(runs // 40, 1) == 0 and number >= WARM_UP:
                resident.append(resident_kib())
            # The warm-up has seeds of its own: with --runs 1 the one run has the seed given.
            own_seed = seed + number - WARM_UP
            # What hangs outside of all waits ends the process, and shows where.
            faulthandler.dump_traceback_later(kit.patience(6 * HANG), exit=True)
            try:
                # Odd seeds are of one end, even ones of the other: a seed alone repeats a run.
                what, has_to_complete, error = trial(own_seed, own_seed, kept, room)
            except Hangs:
                report.hangs.append(f"seed {own_seed}")
                continue
            except AssertionError as wrong:
                report.wrong.append(f"seed {own_seed}: {wrong}")
                clear(room)
                continue
            clear(room)
            if number < WARM_UP:
                continue
            report.runs += 1
            if error is None:
                report.completed += 1
            else:
                report.failed += 1
            if has_to_complete not in (None, error is None):
                report.wrong.append(f"{what}: {error or 'it completed'}")
            elif error is not None and "unexpected" in str(error):
                report.wrong.append(f"{what}: {error}")
            if progress and report.runs % 50 == 0:
                progress(report)
        faulthandler.cancel_dump_traceback_later()
        # The kernel takes a moment to give back what a peer had.
        deadline = time.monotonic() + kit.patience(5)
        while True:
            now = traces(room)
            report.leaks = {
                kind: now[kind] - before[kind] for kind in now if now[kind] > before[kind]
            }
            if not report.leaks or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        report.grown_kib = resident_kib() - memory
        resident.append(resident_kib())
        quarter = max(len(resident) // 4, 1)
        # From one moment to the next it goes up and down by more than any leak: the lowest of
        # each quarter tells what stays.
        report.grown_late_kib = min(resident[-quarter:]) - min(resident[quarter : 2 * quarter])
    report.seconds = round(time.monotonic() - began, 1)
    return report


def main(name: str = "soak", text: str = __doc__, trial: Trial = one) -> int:
    """The command line of a soak; ``name`` and ``text`` are how it calls itself."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    print(f"{name}: {args.runs} migrations from seed {args.seed}", file=sys.stderr, flush=True)

    def progress(report: Report) -> None:
        print(
            f"{report.runs} runs, {report.failed} failed, {len(report.wrong)} wrong, "
            f"{resident_kib()} KiB resident",
            file=sys.stderr,
            flush=True,
        )

    report = soak(args.runs, args.seed, progress, trial)
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        print(
            f"{report.runs} migrations in {report.seconds} s: {report.completed} completed, "
            f"{report.failed} failed as they may, {len(report.wrong)} ended otherwise, "
            f"{len(report.hangs)} hung; left: {report.leaks or 'nothing'}; memory grew by "
            f"{report.grown_kib} KiB, by {report.grown_late_kib} KiB in the second half"
        )
        for line in [*report.wrong, *report.hangs]:
            print(f"  {line}")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
