# SPDX-License-Identifier: Apache-2.0
"""What a trace costs a migration: counted, so that a busy machine says the same as an idle one.

How much longer a migration takes is measured by rdma_trace_cost.py (docs/reliability.md, trace).
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import rdma_command as command
import rdma_kit as kit
import rdma_trace_cost as cost
import snapshot_kit

from rdma_mig.memory import RamBlock
from rdma_mig.migration.events import Completed
from rdma_mig.trace.reading import read_trace
from rdma_mig.tracing import Trace

pytestmark = [pytest.mark.rdma, pytest.mark.deadline(120)]

MIB = 1 << 20


class Watched:
    """What the threads of a migration call that has to do with a trace."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()
        self.clock = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Be told of a call."""
        code = frame.f_code
        if event == "c_call" and argument is time.monotonic:
            self.clock += "rdma_mig" in code.co_filename
        elif code.co_name == "__del__":
            pass  # of an earlier trace; who runs when something is collected, collects it
        elif event == "call" and (
            code.co_filename.endswith(("/rdma_mig/tracing.py", "/rdma_mig/wire/trace.py"))
            or code.co_name in ("_record", "_note_writes")
        ):
            self.called[code.co_name] += 1


@contextlib.contextmanager
def watching() -> Iterator[Watched]:
    """Watch the threads that are started meanwhile."""
    watched = Watched()
    threading.setprofile(watched)
    try:
        yield watched
    finally:
        threading.setprofile(None)


def keep(room: Path, mib: int) -> None:
    """Put a guest there, all of it data."""
    blocks = (RamBlock("pc.ram", mib * MIB),)
    with snapshot_kit.guest(blocks) as memories:
        with memories[0].view() as view:
            for at in range(mib):
                view[at * MIB : (at + 1) * MIB] = snapshot_kit.noise(MIB)
        snapshot_kit.keep(room / "kept", memories, blocks)


def migrate(room: Path, *, pin_all: bool, traced: bool) -> float:
    """Send it to another process; return the seconds of setup and RAM at the source."""
    uri = f"rdma:{kit.device()[1]}:0"
    more = ["--trace", str(room / "in")] if traced else []
    with contextlib.ExitStack() as stack:
        trace = stack.enter_context(Trace(room / "out", "outgoing")) if traced else None
        came = stack.enter_context(command.incoming(uri, room / "vm", *more))
        went = stack.enter_context(
            kit.outgoing(room / "kept", came.uri, trace=trace, pin_all=pin_all)
        )
        went.succeed(60)
        written = next(each for each in came.events() if each["event"] == "completed")
    shutil.rmtree(room / "vm")
    (done,) = [event for event in went.events if isinstance(event, Completed)]
    return done.setup_seconds + done.transfer_seconds - float(written["writing_seconds"])


@pytest.mark.parametrize("pin_all", [True, False], ids=["pin-all", "dynamic"])
def test_nothing_without_one_and_one_look_at_the_clock_for_each_record(
    tmp_path: Path, pin_all: bool
):
    keep(tmp_path, 16)
    with watching() as without:
        migrate(tmp_path, pin_all=pin_all, traced=False)
    assert without.called == {}
    with watching() as traced:
        migrate(tmp_path, pin_all=pin_all, traced=True)
    kinds = [each.record.kind for each in read_trace(tmp_path / "out")]
    # The record "begin" is made by whoever opens the trace.
    assert traced.called["record"] == len(kinds) - 1 > 20
    # What has a duration is looked at twice.
    timed = sum(kind in ("register", "populate") for kind in kinds)
    assert traced.clock - without.clock <= len(kinds) + timed + 2


@pytest.mark.parametrize("pin_all", [True, False], ids=["pin-all", "dynamic"])
def test_less_than_three_per_cent(tmp_path: Path, pin_all: bool):
    """What its records take, of both ends together, against what a migration takes without.

    Other work on the machine makes the second longer, and hardly the first, the least of many.
    Where a look at the clock is a system call, as under User Mode Linux, that is most of it.
    """
    keep(tmp_path, 128)
    migrate(tmp_path, pin_all=pin_all, traced=True)
    records = sum(1 for name in ("in", "out") for _ in read_trace(tmp_path / name))
    taken = min(migrate(tmp_path, pin_all=pin_all, traced=False) for _ in range(2))
    each = cost.time_records(1000)
    assert records * each < 0.03 * taken, f"{records} of {1e6 * each:.1f} us in {taken:.3f} s"
