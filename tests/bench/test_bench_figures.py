# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `make bench`: intervals, the floor of a cell, and which targets are met."""

from __future__ import annotations

from math import comb

import pytest
from contenders import Measured
from figures import GIB, Ratio, Target, floor_seconds, growth, interval, row
from floor import FloorRound


@pytest.mark.parametrize(("rounds", "left_out"), [(5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_interval_leaves_out_as_many_as_95_per_cent_allow(rounds, left_out):
    found = interval([float(value) for value in range(rounds, 0, -1)])
    assert (found.low, found.high) == (1 + left_out, rounds - left_out)
    assert found.median == (rounds + 1) / 2
    assert found.sure is (rounds >= 6)
    # The chance that the true median lies outside: both tails of the sign test.
    outside = 2 * sum(comb(rounds, k) for k in range(left_out + 1)) / 2**rounds
    assert (outside <= 0.05) is found.sure


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [
        (Target("qemu", 1.0), Ratio(1.2, 0.9, 1.5, True), True),
        (Target("qemu", 1.0), Ratio(1.2, 1.1, 1.5, True), False),
        (Target("qemu", 1.0), Ratio(1.2, 0.9, 1.5, False), False),
        (Target("qemu", 1.0), Ratio(0.9, 0.8, 1.5, False), True),
        (Target("writes", 0.9, at_least=True), Ratio(0.8, 0.7, 0.95, True), True),
        (Target("writes", 0.9, at_least=True), Ratio(0.8, 0.7, 0.95, False), False),
    ],
)
def test_target_is_met_by_the_interval_or_with_few_rounds_by_the_median(target, ratio, met):
    assert target.met(ratio) is met


def test_floor_of_a_cell():
    whole = FloorRound(setup=0.4, writes=0.6)
    assert floor_seconds("pin-all", GIB, GIB, whole) == pytest.approx(1.0)
    assert floor_seconds("pin-all", 0, GIB, whole) == pytest.approx(0.4)
    assert floor_seconds("dynamic", GIB // 2, GIB, whole) == pytest.approx(0.5)


@pytest.mark.parametrize(("ram", "judged"), [(GIB, 6), (GIB // 4, 0)])
def test_row_pairs_the_rounds(ram, judged):
    reference = [Measured(total=float(n), user=1.0, system=1.0) for n in range(1, 10)]
    ours = [
        Measured(total=n / 2, transfer=n / 4, disk=1.1, user=0.1, system=0.4) for n in range(1, 10)
    ]
    cell = {"ram": ram, "content": "random", "mode": "pin-all", "data": ram}
    found = row(cell, ("ours", "ours"), ours, reference, [FloorRound(0.1, 0.2)] * 9, [1.0] * 9)
    assert found["ratios"]["qemu"] == {"median": 0.5, "low": 0.5, "high": 0.5, "sure": True}
    assert found["ratios"]["user"]["median"] == pytest.approx(0.1)
    assert found["cpu_seconds_per_gib"] == pytest.approx(0.5 * GIB / ram)
    assert len(found["targets"]) == judged


def test_growth_compares_the_pace_of_the_largest_with_that_of_the_smallest():
    def of(ram: int, total: float, mode: str = "pin-all", content: str = "random"):
        ends = {"source": "ours", "destination": "ours"}
        return {"ram": ram, "mode": mode, "content": content, "median": {"total": total}, **ends}

    rows = [of(GIB, 1.0), of(2 * GIB, 2.2), of(GIB, 1.0, "dynamic"), of(2 * GIB, 2.4, "dynamic")]
    rows += [of(GIB, 1.0, "dynamic", "idle"), of(2 * GIB, 9.0, "dynamic", "idle")]
    found = growth(rows)
    assert [(round(row["value"], 2), row["met"]) for row in found] == [(1.2, False), (1.1, True)]
