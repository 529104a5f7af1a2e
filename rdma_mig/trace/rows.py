# SPDX-License-Identifier: Apache-2.0
"""What a sequence diagram of a trace shows, row by row, repetitions told once. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rdma_mig.trace.grammar import Side, sender_of
from rdma_mig.trace.pairs import Traced, clock_offset
from rdma_mig.trace.reading import Numbered
from rdma_mig.words import printable

__all__ = ["Row", "fold", "merged_rows", "shortened"]

_PERIOD_MAX = 8  # rows; the exchange for one chunk has six
_SHOWN = ("out", "in", "phase", "register", "populate", "write", "commit", "connected", "end")


@dataclass(frozen=True, slots=True)
class Row:
    """An arrow between the ends, or a note beside one of them.

    Attributes:
        t: seconds, when it happened first.
        sender: whose arrow or note it is.
        arrow: "" for a note, "message" or "write".
        text: what.
        size: bytes in all.
        count: how often, in a row (or in a row of the same rows).
        of: how many rows repeat together with this one, itself included.
    """

    t: float
    sender: Side
    arrow: str
    text: str
    size: int = 0
    count: int = 1
    of: int = 1

    @property
    def key(self) -> tuple[Side, str, str]:
        """What makes two rows the same."""
        return self.sender, self.arrow, self.text


def _row(record: Numbered, role: str, offset: float) -> Row | None:
    kind = record.record.kind
    if kind not in _SHOWN:
        return None
    here = Side.SOURCE if role == "outgoing" else Side.DESTINATION
    t = record.record.t + offset
    match kind:
        case "out" | "in":
            channel = record["channel"].replace("return-path", "return path")
            where = "" if channel == "control" else f" ({printable(channel)})"
            text = f"{record['type']}{where}"
            return Row(t, sender_of(role, kind), "message", text, record["length"])
        case "write":
            return Row(t, here, "write", f"RDMA WRITE {record['block']}", record["bytes"])
        case "phase":
            name = f"phase {record['number']}" if record["number"] else "setup"
            return Row(t, here, "", f"{name} {record['state']}s")
        case "register":
            chunk = "" if record["chunk"] is None else "chunk of "
            return Row(t, here, "", f"registers {chunk}{record['block']}", record["bytes"])
        case "populate":
            return Row(t, here, "", "populates RAM", record["bytes"])
        case "commit":
            return Row(t, here, "", f"commit point {record['state']} {record['by']}")
        case "connected":
            return Row(t, here, "", "connected")
    return Row(t, here, "", str(record["status"]))


def merged_rows(one: Traced, other: Traced | None) -> list[Row]:
    """Return the rows of one trace, or of both ends': a message then stands there once."""
    rows = [row for each in one.records if (row := _row(each, one.rules.role, 0.0))]
    if other is not None:
        offset = clock_offset(one, other)
        rows += [
            row
            for each in other.records
            if each.record.kind not in ("out", "in")
            and (row := _row(each, other.rules.role, offset))
        ]
        rows.sort(key=lambda row: row.t)
    return rows


def fold(rows: Sequence[Row]) -> list[Row]:
    """Tell once what repeats: the same row, or the same few rows, again and again."""
    folded: list[Row] = []
    at = 0
    while at < len(rows):
        period, times = _repetition(rows, at)
        for place in range(period):
            same = rows[at + place : at + period * times : period]
            folded.append(
                replace(
                    rows[at + place],
                    count=times,
                    size=sum(row.size for row in same),
                    of=period if times > 1 else 1,
                )
            )
        at += period * times
    return folded


def _repetition(rows: Sequence[Row], at: int) -> tuple[int, int]:
    """Return how many rows repeat from here on, and how often: what saves most rows."""
    best = (1, 1)
    for period in range(1, _PERIOD_MAX + 1):
        end = at + period
        while end < len(rows) and rows[end].key == rows[end - period].key:
            end += 1
        times = (end - at) // period
        if (times - 1) * period > (best[1] - 1) * best[0]:
            best = (period, times)
    return best


def shortened(rows: Sequence[Row], most: int) -> list[Row]:
    """Leave out the middle of what is longer than ``most`` rows, and say how much that is."""
    if len(rows) <= most:
        return list(rows)
    head = most // 2
    tail = most - head - 1
    left_out = len(rows) - head - tail
    gap = Row(rows[head].t, Side.SOURCE, "", f"... {left_out} rows are left out ...")
    return [*rows[:head], gap, *rows[-tail:]]
