# SPDX-License-Identifier: Apache-2.0
"""A trace as a picture, by matplotlib: the sequence of messages, and a time line beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdma_mig.errors import HostError, UsageError
from rdma_mig.trace.grammar import Side
from rdma_mig.trace.pairs import Traced, clock_offset
from rdma_mig.trace.rows import Row, fold, merged_rows, shortened
from rdma_mig.words import size_of

__all__ = ["FORMATS", "draw"]

FORMATS = (".svg", ".png")
_ROWS_MAX = 160
_X = {Side.SOURCE: 0.0, Side.DESTINATION: 1.0}
_COLOURS = {
    "phase": "#4c78a8",
    "populate": "#f2cf5b",
    "register": "#eeca3b",
    "wait": "#bab0ac",
    "message": "#333333",
    "write": "#e45756",
    "commit": "#b279a2",
}


def draw(one: Traced, other: Traced | None, target: Path) -> None:
    """Draw one end's trace, or both ends' together; the file gets its name when it is whole.

    Raises:
        UsageError: another format than `FORMATS` has.
        HostError: matplotlib is not there, or the file cannot be written.
    """
    if target.suffix.lower() not in FORMATS:
        raise UsageError(
            f"{target} is no {' or '.join(FORMATS)}", remedy="give the picture such a name"
        )
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HostError(
            "drawing needs the library matplotlib, the extra 'chart'",
            remedy="pip install 'matplotlib>=3.6'",
        ) from error
    rows = shortened(fold(merged_rows(one, other)), _ROWS_MAX)
    ends = [one] if other is None else [one, other]
    height = min(max(6.0, 0.24 * len(rows) + 1.5), 60.0)
    figure = Figure(figsize=(18, height), layout="constrained")
    sequence, line = figure.subplots(1, 2, width_ratios=[3, 2])
    _sequence(sequence, rows, one.rules.role if other is None else "")
    _time_line(line, ends)
    partial = target.with_name(f".{target.name}.{os.getpid()}{target.suffix}")
    try:
        # Text stays text in an SVG, and the same trace makes the same file.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rdma-mig"}):
            metadata = {"Date": None} if target.suffix.lower() == ".svg" else {}
            figure.savefig(partial, dpi=90, metadata=metadata)
        partial.replace(target)
    except OSError as error:
        raise HostError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _plain(text: str) -> str:
    """Return text that matplotlib has a glyph for, and takes for no formula."""
    return ascii(text[:90])[1:-1].replace("$", r"\$")


def _sequence(axes: Any, rows: list[Row], only: str) -> None:
    whose = f", as {only} saw it" if only else ""
    axes.set_title(f"sequence{whose} (time from top to bottom, not to scale)", fontsize=10)
    axes.set_xlim(-1.1, 2.1)
    axes.set_ylim(len(rows) + 0.5, -1.5)
    axes.axis("off")
    for side, x in _X.items():
        axes.plot([x, x], [-0.5, len(rows)], color="#888888", linewidth=1)
        axes.text(x, -0.8, side.value, ha="center", weight="bold")
    for place, row in enumerate(rows):
        text = row.text
        if row.count > 1:
            text += f"  x{row.count}" + (f" (with the {row.of - 1} beside)" if row.of > 1 else "")
        if row.size:
            text += f"  {size_of(row.size)}"
        x, over = _X[row.sender], _X[row.sender.other]
        if row.arrow:
            colour = _COLOURS[row.arrow]
            width = 2.0 if row.arrow == "write" else 0.8
            axes.annotate(
                "",
                xy=(over, place),
                xytext=(x, place),
                arrowprops={"arrowstyle": "->", "color": colour, "linewidth": width},
            )
            axes.text(0.5, place - 0.12, _plain(text), ha="center", fontsize=7, color=colour)
        else:
            align, shift = ("right", -0.04) if row.sender is Side.SOURCE else ("left", 0.04)
            axes.text(x + shift, place + 0.2, _plain(text), ha=align, fontsize=7, style="italic")
        if place == 0 or row.t - rows[place - 1].t > 0.001 or place == len(rows) - 1:
            axes.text(-1.1, place + 0.2, f"{row.t:.4f} s", fontsize=6, color="#888888")


def _time_line(axes: Any, ends: list[Traced]) -> None:
    names = ["RAM phases", "memory", "waits", "messages", "RAM written"]
    axes.set_title("time line", fontsize=10)
    labels: list[str] = []
    for place, end in enumerate(ends):
        offset = clock_offset(ends[0], end) if place else 0.0
        side = "source" if end.rules.role == "outgoing" else "destination"
        base = place * len(names)
        labels += [f"{side}: {name}" for name in names]
        for row, start, seconds, kind in _bars(end):
            axes.barh(
                base + row,
                max(seconds, 1e-5),
                left=start + offset,
                height=0.6,
                color=_COLOURS[kind],
                linewidth=0,
            )
        messages = [e.record.t + offset for e in end.records if e.record.kind in ("out", "in")]
        axes.plot(messages, [base + 3] * len(messages), "|", color=_COLOURS["message"], ms=9)
        writes = [e.record.t + offset for e in end.records if e.record.kind == "write"]
        axes.plot(writes, [base + 4] * len(writes), "|", color=_COLOURS["write"], ms=9)
        for each in end.records:
            if each.record.kind == "commit":
                t = each.record.t + offset
                axes.axvline(t, color=_COLOURS["commit"], linestyle=":", linewidth=1.2)
                text = _plain(f"{each['state']} {each['by']}")
                axes.text(t, base - 0.4, text, rotation=90, fontsize=6, va="bottom")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -1.6)
    axes.set_xlabel("seconds since the trace of the first file was begun")
    axes.grid(axis="x", color="#dddddd")


def _bars(end: Traced) -> Iterator[tuple[int, float, float, str]]:
    """Yield what takes time: row, when it began, how long it took, its kind."""
    phase = 0.0
    for each in end.records:
        t = each.record.t
        match each.record.kind:
            case "phase" if each["state"] == "begin":
                phase = t
            case "phase":
                yield 0, phase, t - phase, "phase"
            case "populate" | "register":
                yield 1, t - each["seconds"], each["seconds"], each.record.kind
            case "wait":
                yield 2, t - each["seconds"], each["seconds"], "wait"
