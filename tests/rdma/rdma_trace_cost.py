# SPDX-License-Identifier: Apache-2.0
"""What --trace costs a migration: runs with and without it by turns, on both ends.

    rdma_trace_cost.py [--runs N] [--mib SIZE ...] [--same] | --records N

Both ends run over the device, as two processes. Told are the seconds at the source from the RAM
phase of setup to the end of the last one. --same compares runs without a trace with each other,
which says how much of a difference is chance.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]

import rdma_kit as kit  # noqa: E402

from rdma_mig.host.sample import Sample, receive_sample  # noqa: E402
from rdma_mig.migration.rdma import (  # noqa: E402
    RdmaOptions,
    rdma_start_incoming_migration,
    rdma_start_outgoing_migration,
)
from rdma_mig.migration.state import Migration  # noqa: E402
from rdma_mig.trace.reading import read_trace  # noqa: E402
from rdma_mig.tracing import Trace  # noqa: E402


class Destination:
    """The other end, in a process of its own; it takes one sample after the other."""

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        # Before this process has anything of the device's.
        self._process = multiprocessing.get_context("fork").Process(
            target=self._serve, args=(theirs,), daemon=True
        )
        self._process.start()

    @staticmethod
    def _serve(pipe: Connection) -> None:
        while (wanted := pipe.recv()) is not None:
            path, size = wanted
            with contextlib.ExitStack() as stack:
                trace = stack.enter_context(Trace(path, "incoming")) if path else None
                migration = stack.enter_context(Migration(trace=trace))
                address = rdma_start_incoming_migration(
                    f"rdma:{kit.device()[1]}:0",
                    migration=migration,
                    process=functools.partial(receive_sample, size=size),
                )
                pipe.send(str(address))
                migration.wait(120)
            pipe.send("done")

    def ask(self, trace: str, size: int) -> str:
        """Where it listens for the next one."""
        self._pipe.send((trace, size))
        return str(self._pipe.recv())

    def done(self) -> None:
        """Wait until it has taken the last one."""
        self._pipe.recv()

    def close(self) -> None:
        """End it."""
        self._pipe.send(None)
        self._process.join()


def once(
    there: Destination, sample: Sample, room: Path, *, pin_all: bool, traced: bool
) -> tuple[float, int]:
    """Seconds of setup and RAM at the source, and how many records both ends have written."""
    traces = [room / role for role in ("incoming", "outgoing")]
    uri = there.ask(str(traces[0]) if traced else "", sample.ram.total)
    with contextlib.ExitStack() as stack:
        trace = stack.enter_context(Trace(traces[1], "outgoing")) if traced else None
        migration = stack.enter_context(Migration(trace=trace))
        rdma_start_outgoing_migration(
            migration, uri, ram=sample.ram, save=sample.save, options=RdmaOptions(pin_all=pin_all)
        )
        migration.wait(120)
    there.done()
    records = sum(1 for path in traces for _ in read_trace(path)) if traced else 0
    return sample.setup_seconds + sample.transfer_seconds, records


def time_records(count: int) -> float:
    """Seconds that one record takes: the least of as many bunches of 20 as make so many.

    A bunch is short, so that some have the processor to themselves on a busy machine.
    """
    took = []
    with tempfile.TemporaryDirectory() as folder, Trace(Path(folder, "t"), "outgoing") as trace:
        for _ in range(count // 20):
            began = time.perf_counter()
            for _ in range(20):
                trace.record("out", channel="control", type="QEMU_FILE", length=123, repeat=0)
            took.append((time.perf_counter() - began) / 20)
    return min(took)


def compare(
    there: Destination, sample: Sample, room: Path, runs: int, *, pin_all: bool, same: bool
) -> str:
    """Measure by turns; return what is to be told."""
    once(there, sample, room, pin_all=pin_all, traced=True)
    off, on, records = [], [], 0
    for number in range(runs):
        # Which of the two goes first changes from pair to pair.
        for second in (False, True) if number % 2 else (True, False):
            traced = second and not same
            seconds, made = once(there, sample, room, pin_all=pin_all, traced=traced)
            (on if second else off).append(seconds)
            records = made or records
    pairs = statistics.median(b / a for a, b in zip(off, on, strict=True))
    return (
        f"{'pin-all' if pin_all else 'dynamic'}: {sample.ram.total >> 20} MiB, {runs} of each, "
        f"{records} records: off {statistics.median(off):.4f} s (least {min(off):.4f}), "
        f"{'off again' if same else 'on'} {statistics.median(on):.4f} s (least {min(on):.4f}); "
        f"medians {100 * (statistics.median(on) / statistics.median(off) - 1):+.1f} %, least "
        f"{100 * (min(on) / min(off) - 1):+.1f} %, pairs {100 * (pairs - 1):+.1f} %"
    )


def main() -> None:
    """Measure, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256], help="multiples of 16")
    parser.add_argument("--same", action="store_true", help="no trace at all, for comparison")
    parser.add_argument("--records", type=int, help="only time so many records; needs no device")
    args = parser.parse_args()
    if args.records:
        print(f"{1e6 * time_records(args.records):.1f} microseconds a record")
        return
    with tempfile.TemporaryDirectory() as folder:
        there = Destination()
        for mib in args.mib:
            sample = Sample.make(mib << 20)
            with sample.ram:
                for pin_all in (True, False):
                    room = Path(folder)
                    print(
                        compare(there, sample, room, args.runs, pin_all=pin_all, same=args.same),
                        flush=True,
                    )
        there.close()


if __name__ == "__main__":
    main()
