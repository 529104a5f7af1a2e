#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a page costs that ram_control_save_page() takes, nanoseconds: contiguous pages, no writes.

Each page but the first of a chunk extends the pending run; only those are timed. Prints one JSON
object: ``python`` for calls from Python, loop and arguments included, ``cython`` for an engine that
is compiled (hook_loop.pyx).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]

import hooks_kit as hooks  # noqa: E402
import rdma_kit as kit  # noqa: E402
from harness.compiling import compiled  # noqa: E402

from rdma_mig.memory.ram import GuestRam  # noqa: E402
from rdma_mig.migration.ram_control import ram_control_save_page  # noqa: E402

_ROUNDS = 200


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="rdma-mig-hooks-") as directory:
        measure(compiled(Path(__file__).with_name("hook_loop.pyx"), Path(directory)))


def measure(loop: ModuleType) -> None:
    engine = hooks.Engine()
    found: dict[str, list[float]] = {"python": [], "cython": [], "clock": []}

    def save(file, _counts):
        hooks.begin(file)

        def each():
            offsets = [page * hooks.PAGE for page in range(1, hooks.CHUNK)]
            for _ in range(_ROUNDS):
                ram_control_save_page(file, 0, 0, hooks.PAGE)
                began = time.perf_counter_ns()
                for offset in offsets:
                    ram_control_save_page(file, 0, offset, 4096)
                found["python"].append(time.perf_counter_ns() - began)
                ram_control_save_page(file, 0, 0, hooks.PAGE)
                began = time.perf_counter_ns()
                loop.save(file, 0, hooks.PAGE, len(offsets))
                found["cython"].append(time.perf_counter_ns() - began)
                began = time.perf_counter_ns()
                found["clock"].append(time.perf_counter_ns() - began)

        hooks.a_round(file, each)
        hooks.finish(file)

    with GuestRam(kit.BLOCKS) as ram:
        ram.populate(lambda: False)
        hooks.run(engine.told()["uri"], ram, save)
    engine.close()
    # Where the clock is a system call it takes longer than the pages.
    clock = statistics.median(found.pop("clock"))
    print(
        json.dumps(
            {
                name: round((statistics.median(each) - clock) / (hooks.CHUNK - 1), 1)
                for name, each in found.items()
            }
        )
    )


if __name__ == "__main__":
    main()
