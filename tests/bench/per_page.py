# SPDX-License-Identifier: Apache-2.0
"""What work by the page costs: dirty bitmaps, finding zeros, and the call of the hooks."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rdma_mig import _pages
from rdma_mig.memory import DirtyBitmap, GuestMemory

GIB = 1 << 30
_HOOKS = Path(__file__).resolve().parents[1] / "rdma" / "rdma_hook_cost.py"
# Larger than any cache, so that memory is what is read.
_READ = GIB // 2
_RUN = 8


def _milliseconds(work: Callable[[], object], rounds: int = 9) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


def _bitmaps() -> list[dict[str, Any]]:
    """Find what is dirty in 64 GiB: nothing, and one page in a hundred in runs of eight."""
    bitmap = DirtyBitmap.of_length(64 * GIB)

    def harvest() -> int:
        return sum(len(runs) for runs in bitmap.runs())

    clean = _milliseconds(harvest)
    for first in range(0, bitmap.pages, 100 * _RUN):
        bitmap.set(first, min(_RUN, bitmap.pages - first))
    return [
        row("dirty bitmap of 64 GiB, clean", clean, "ms", 5),
        row("dirty bitmap of 64 GiB, 1 % dirty", _milliseconds(harvest), "ms", 60),
    ]


def _zeros() -> dict[str, Any]:
    """Look for anything but zeros, beside reading the same memory as fast as one core can."""
    with GuestMemory(_READ, "bench") as memory:
        memory.populate()
        with memory.view() as view:
            words = np.frombuffer(view, dtype=np.uint64)
            looks, reads = [], []
            for _ in range(9):
                began = time.perf_counter()
                assert _pages.is_zero(view)
                looks.append(time.perf_counter() - began)
                began = time.perf_counter()
                assert words.max() == 0
                reads.append(time.perf_counter() - began)
            del words
    share = statistics.median(read / look for read, look in zip(reads, looks, strict=True))
    speed = _READ / statistics.median(looks) / 1e9
    found = row("finding zeros, share of reading", share, "", 0.8, at_least=True)
    return found | {
        "detail": f"{speed:.1f} GB/s beside {_READ / statistics.median(reads) / 1e9:.1f}"
    }


def _hooks() -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, _HOOKS], stdout=subprocess.PIPE, check=True, timeout=300)
    cost = json.loads(done.stdout)
    return [
        row("hook for a page, called from Cython", cost["cython"], "ns", 30),
        row("hook for a page, called from Python", cost["python"], "ns", 100),
    ]


def row(
    what: str, value: float, unit: str, limit: float, *, at_least: bool = False
) -> dict[str, Any]:
    """Return a row of the table: what was measured, and whether it reaches its target."""
    met = value >= limit if at_least else value <= limit
    return {
        "what": what, "value": value, "unit": unit, "limit": limit, "at_least": at_least,
        "met": met,
    }  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """Return rows of a table: medians of nine (the hooks' of 200), and targets."""
    return [*_hooks(), *_bitmaps(), _zeros()]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| what | | target |", "|---|---|---|"]
    for row in rows:
        sign = ">=" if row["at_least"] else "<="
        said = "met" if row["met"] else "**missed**"
        shown = f"{row['value']:.3g} {row['unit']}".strip()
        detail = f" ({row['detail']})" if "detail" in row else ""
        lines.append(f"| {row['what']} | {shown}{detail} | {said}: {sign} {row['limit']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([*_bitmaps(), _zeros()]))
