# SPDX-License-Identifier: Apache-2.0
"""What --trace costs a migration: runs with and without it by turns, on both ends.

    rdma_trace_cost.py [--runs N] [--mib SIZE] | --records N

Both ends run over the device, as two processes. Told are the seconds from the connection to the
end, at the source, without the reading and writing of snapshots.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]

import rdma_kit as kit  # noqa: E402
import snapshot_kit  # noqa: E402

from rdma_mig.memory import RamBlock  # noqa: E402
from rdma_mig.migration.events import Completed  # noqa: E402
from rdma_mig.tracing import Trace  # noqa: E402


class Destination:
    """The other end, in a process of its own; it takes one migration after the other."""

    def __init__(self, room: Path) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        # Before this process has anything of the device's.
        self._process = multiprocessing.get_context("fork").Process(
            target=self._serve, args=(theirs, room), daemon=True
        )
        self._process.start()

    @staticmethod
    def _serve(pipe: Connection, room: Path) -> None:
        while (trace := pipe.recv()) is not None:
            with contextlib.ExitStack() as stack:
                told = stack.enter_context(Trace(trace, "incoming")) if trace else None
                end = stack.enter_context(kit.incoming(room / "vm", trace=told))
                pipe.send(end.uri)
                end.succeed(60)
                (done,) = [event for event in end.events if isinstance(event, Completed)]
            shutil.rmtree(room / "vm")
            pipe.send(done.writing_seconds)

    def ask(self, trace: str) -> str:
        """Where it listens for the next one."""
        self._pipe.send(trace)
        return str(self._pipe.recv())

    def written(self) -> float:
        """Seconds that it took to write the last one."""
        return float(self._pipe.recv())

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def once(
    there: Destination, kept: Path, room: Path, *, pin_all: bool, traced: bool
) -> tuple[float, int]:
    """Seconds of setup and RAM at the source, and how many records both ends have written."""
    traces = [room / role for role in ("incoming", "outgoing")]
    uri = there.ask(str(traces[0]) if traced else "")
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(Trace(traces[1], "outgoing")) if traced else None
        sent = stack.enter_context(kit.outgoing(kept, uri, trace=told, pin_all=pin_all))
        sent.succeed(60)
        (done,) = [event for event in sent.events if isinstance(event, Completed)]
    # Behind RAM the destination writes to disk, which has nothing to do with a trace.
    seconds = done.setup_seconds + done.transfer_seconds - there.written()
    records = sum(len(path.read_bytes().splitlines()) for path in traces) if traced else 0
    return seconds, records


def time_records(count: int) -> float:
    """Seconds that one record takes: the least of five times so many."""
    took = []
    with tempfile.TemporaryDirectory() as folder, Trace(Path(folder, "t"), "outgoing") as trace:
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(count):
                trace.record("out", channel="control", type="QEMU_FILE", length=123, repeat=0)
            took.append((time.perf_counter() - began) / count)
    return min(took)


def main() -> None:
    """Measure, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--records", type=int, help="only time so many records; needs no device")
    args = parser.parse_args()
    if args.records:
        print(f"{1e6 * time_records(args.records):.1f} microseconds a record")
        return
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        there = Destination(room)
        blocks = (RamBlock("pc.ram", args.mib << 20),)
        with snapshot_kit.guest(blocks) as memories:
            with memories[0].view() as view:
                view[:] = snapshot_kit.noise(1 << 20) * args.mib
            kept = snapshot_kit.keep(room / "kept", memories, blocks)
        for pin_all in (True, False):
            once(there, kept, room, pin_all=pin_all, traced=True)
            off, on, records = [], [], 0
            for _ in range(args.runs):
                off.append(once(there, kept, room, pin_all=pin_all, traced=False)[0])
                seconds, records = once(there, kept, room, pin_all=pin_all, traced=True)
                on.append(seconds)
            by_turns = statistics.median(b / a for a, b in zip(off, on, strict=True))
            print(
                f"{'pin-all' if pin_all else 'dynamic'}: {args.mib} MiB, {args.runs} of each, "
                f"{records} records: off {statistics.median(off):.4f} s (least {min(off):.4f}), "
                f"on {statistics.median(on):.4f} s (least {min(on):.4f}); medians "
                f"{100 * (statistics.median(on) / statistics.median(off) - 1):+.1f} %, least "
                f"{100 * (min(on) / min(off) - 1):+.1f} %, pairs {100 * (by_turns - 1):+.1f} %",
                flush=True,
            )
        there.close()


if __name__ == "__main__":
    main()
