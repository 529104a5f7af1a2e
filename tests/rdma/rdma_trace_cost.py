# SPDX-License-Identifier: Apache-2.0
"""What --trace costs a migration: runs with and without it by turns, on both ends.

    rdma_trace_cost.py [--runs N] [--mib SIZE]

Both ends are in this process, over the device. Told are the seconds from the connection to the end, at
the source, without the reading and writing of snapshots.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]

import rdma_kit as kit  # noqa: E402
import snapshot_kit  # noqa: E402

from rdma_mig.memory import RamBlock  # noqa: E402
from rdma_mig.migration.events import Completed  # noqa: E402
from rdma_mig.tracing import Trace  # noqa: E402


def once(kept: Path, room: Path, *, pin_all: bool, traced: bool) -> tuple[float, int]:
    """Seconds of setup and RAM at the source, and how many records both ends have written."""
    with contextlib.ExitStack() as stack:
        traces = [
            stack.enter_context(Trace(room / role, role)) if traced else None
            for role in ("incoming", "outgoing")
        ]
        end = stack.enter_context(kit.incoming(room / "vm", trace=traces[0]))
        sent = stack.enter_context(kit.outgoing(kept, end.uri, trace=traces[1], pin_all=pin_all))
        sent.succeed(60)
        end.succeed(60)
        (done,) = [event for event in sent.events if isinstance(event, Completed)]
        # Behind RAM the destination writes to disk, which has nothing to do with a trace.
        (there,) = [event for event in end.events if isinstance(event, Completed)]
    snapshot = room / "vm"
    for path in snapshot.rglob("*"):
        if path.is_file():
            path.unlink()
    for path in sorted(snapshot.rglob("*"), reverse=True):
        path.rmdir()
    snapshot.rmdir()
    records = (
        sum(len((room / r).read_bytes().splitlines()) for r in ("incoming", "outgoing"))
        if (traced)
        else 0
    )
    return done.setup_seconds + done.transfer_seconds - there.writing_seconds, records


def main() -> None:
    """Measure, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--mib", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        blocks = (RamBlock("pc.ram", args.mib << 20),)
        with snapshot_kit.guest(blocks) as memories:
            with memories[0].view() as view:
                view[:] = snapshot_kit.noise(1 << 20) * args.mib
            kept = snapshot_kit.keep(room / "kept", memories, blocks)
        for pin_all in (True, False):
            once(kept, room, pin_all=pin_all, traced=True)
            off, on, records = [], [], 0
            for _ in range(args.runs):
                off.append(once(kept, room, pin_all=pin_all, traced=False)[0])
                seconds, records = once(kept, room, pin_all=pin_all, traced=True)
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


if __name__ == "__main__":
    main()
