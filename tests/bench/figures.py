# SPDX-License-Identifier: Apache-2.0
"""From rounds to rows: medians, paired ratios with their interval, targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

from contenders import ASSUMING, REFERENCE, Measured
from floor import FloorRound

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Ratio:
    """A median of paired ratios, and its 95 % interval.

    The interval is that of the sign test: with fewer than six rounds all of them, and less sure.

    Attributes:
        sure: there were rounds enough for 95 %.
    """

    median: float
    low: float
    high: float
    sure: bool

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(values: Sequence[float]) -> Ratio:
    """Return the median and the narrowest pair of order statistics that covers it with 95 %."""
    ordered = sorted(values)
    n = len(ordered)
    outside, rank = 0.5**n, 0
    # With `rank` values left out at each end, both tails together.
    while rank + 1 < n / 2 and 2 * (outside + comb(n, rank + 1) * 0.5**n) <= 0.05:
        rank += 1
        outside += comb(n, rank) * 0.5**n
    return Ratio(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank], n >= 6)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of each round's pair."""
    return interval([a / b for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True, slots=True)
class Target:
    """What a row has to reach: a ratio that is at most (or at least) so much."""

    what: str
    limit: float
    at_least: bool = False

    def met(self, ratio: Ratio) -> bool:
        """Whether the interval reaches it, or the median where the interval is too wide to say."""
        if self.at_least:
            return (ratio.high if ratio.sure else ratio.median) >= self.limit
        return (ratio.low if ratio.sure else ratio.median) <= self.limit


#: By content, mode, source, destination; of a guest of 1 GiB, but for those of QEMU to ours.
TARGETS: dict[tuple[str, str, str, str], list[Target]] = {
    ("random", "pin-all", "ours", "ours"): [
        Target("floor", 1.15), Target("qemu", 0.75), Target("writes", 0.90, at_least=True),
        Target("user", 0.3), Target("cpu", 0.7),
    ],
    ("random", "dynamic", "ours", "ours"): [
        Target("floor", 1.15), Target("qemu", 0.5), Target("writes", 0.90, at_least=True),
    ],
    ("random", "pin-all", "ours", "qemu"): [Target("qemu", 0.75)],
    ("random", "dynamic", "ours", "qemu"): [Target("qemu", 0.8)],
    ("idle", "dynamic", "ours", "ours"): [Target("qemu", 0.02)],
    ("idle", "dynamic", "ours", "qemu"): [Target("qemu", 0.35)],
    ("idle", "dynamic", *ASSUMING): [Target("qemu", 0.03)],
    ("idle", "pin-all", "ours", "ours"): [
        Target("floor", 1.15), Target("qemu", 0.45), Target("pinned", 1.0, at_least=True),
    ],
    **{
        (content, mode, "qemu", "ours"): [Target("qemu", 1.0)]
        for content in ("idle", "random", "half") for mode in ("pin-all", "dynamic")
    },
}  # fmt: skip


def floor_seconds(mode: str, data: int, ram: int, whole: FloorRound) -> float:
    """Return the floor of a row, from one round over all of its RAM.

    With pin-all, all memory is populated and registered, in dynamic mode what holds data; data is
    written, and zeros need not be.
    """
    share = data / ram
    return whole.setup * (1.0 if mode == "pin-all" else share) + whole.writes * share


def row(
    cell: dict[str, Any],
    pair: tuple[str, str],
    rounds: list[Measured],
    reference: list[Measured],
    floors: list[FloorRound],
    copies: list[float],
) -> dict[str, Any]:
    """Return a row of the table: medians, ratios and targets.

    ``copies`` are the seconds that dd took, round by round, to put the data to the same disk.
    """
    ram, data, mode = cell["ram"], cell["data"], cell["mode"]
    medians = {
        key: statistics.median(values)
        for key in asdict(rounds[0])
        if None not in (values := [getattr(measured, key) for measured in rounds])
    }
    ratios = {
        "qemu": paired([m.total for m in rounds], [m.total for m in reference]),
        "cpu": paired(*_busy(rounds, reference)),
    }
    split = all(m.user for m in reference)
    if split:
        ratios["user"] = paired([m.user for m in rounds], [m.user for m in reference])
    if data or mode == "pin-all":
        least = [floor_seconds(mode, data, ram, floor) for floor in floors]
        ratios["floor"] = paired([m.total for m in rounds], least)
    if data:
        raw = [floor.writes * data / ram for floor in floors]
        ratios["writes"] = paired(raw, [m.transfer for m in rounds])
    pins = [m.pinned for m in rounds if m.pinned is not None]
    if mode == "pin-all" and pins:
        ratios["pinned"] = paired(pins, [ram] * len(pins))
    kept = [m.disk for m in rounds if m.disk is not None]
    if data and kept:
        ratios["disk"] = paired(kept, copies)
    targets = []
    if pair != REFERENCE:
        # The targets that compare with more than QEMU to QEMU are those of a guest of 1 GiB.
        wanted = pair == ("qemu", "ours") or ram == GIB
        on_disk = [Target("disk", 1.15)] if cell["content"] == "random" else []
        for target in [*TARGETS.get((cell["content"], mode, *pair), []), *on_disk]:
            if wanted and target.what in ratios:
                targets.append(asdict(target) | {"met": target.met(ratios[target.what])})
    return {
        **cell,
        "source": pair[0],
        "destination": pair[1],
        "median": medians,
        "cpu_seconds_per_gib": (medians["user"] + medians["system"]) / (ram / GIB),
        # Some kernels book all as system time: then there is nothing to say of its parts.
        "user_seconds_per_gib": medians["user"] / (ram / GIB) if split else None,
        "system_seconds_per_gib": medians["system"] / (ram / GIB) if split else None,
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "targets": targets,
        "rounds": [asdict(measured) for measured in rounds],
        "floors": [asdict(floor) for floor in floors],
    }


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how the seconds a byte of the largest guest compare with those of the smallest.

    Between two rdma-migrate, by content and mode; the target is 15 % more at most.
    """
    found = []
    ours = [row for row in rows if (row["source"], row["destination"]) == ("ours", "ours")]
    for kind in sorted({(row["content"], row["mode"]) for row in ours}):
        sizes = {row["ram"]: row for row in ours if (row["content"], row["mode"]) == kind}
        small, large = min(sizes), max(sizes)
        if small == large or kind == ("idle", "dynamic"):
            continue  # where nothing moves, fixed costs are all there is
        pace = [sizes[ram]["median"]["total"] / ram for ram in (small, large)]
        value = pace[1] / pace[0]
        found.append(
            {
                "what": f"growth from {small >> 20} to {large >> 20} MiB, {' '.join(kind)}",
                "value": value, "unit": "", "limit": 1.15, "at_least": False,
                "met": value <= 1.15,
            }
        )  # fmt: skip
    return found


def _busy(*sides: list[Measured]) -> list[list[float]]:
    return [[max(m.user + m.system, 1e-3) for m in side] for side in sides]


_COLUMNS = (
    "RAM", "content", "mode", "from", "to", "total s", "setup", "transfer", "load", "write", "wall",
    "CPU s/GiB, user + system", "peak MiB", "x QEMU [95 %]", "x floor [95 %]", "of raw writes",
    "disk x dd", "targets",
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows)])


def _cells(row: dict[str, Any]) -> list[str]:
    medians, ratios = row["median"], row["ratios"]

    def seconds(key: str) -> str:
        return f"{medians[key]:.3f}" if key in medians else ""

    def ratio(key: str) -> str:
        return str(Ratio(**ratios[key])) if key in ratios else ""

    cpu = f"{row['cpu_seconds_per_gib']:.2f}"
    if row["user_seconds_per_gib"] is not None:
        cpu = f"{row['user_seconds_per_gib']:.2f} + {row['system_seconds_per_gib']:.2f}"
    said = [
        f"{'met' if target['met'] else '**missed**'}: {target['what']} "
        f"{'>=' if target['at_least'] else '<='} {target['limit']}"
        for target in row["targets"]
    ]
    return [
        f"{row['ram'] >> 20} MiB", row["content"], row["mode"], row["source"], row["destination"],
        *map(seconds, ("total", "setup", "transfer", "load", "write", "wall")),
        cpu, f"{medians['peak'] / 2**20:.0f}",
        ratio("qemu"), ratio("floor"), ratio("writes"), ratio("disk"), "; ".join(said),
    ]  # fmt: skip
