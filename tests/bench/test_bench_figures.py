# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `make bench`: intervals, the floor of a cell, and which targets are met."""

from __future__ import annotations

from math import comb

import pytest
from contenders import ASSUMING, Measured
from figures import GIB, Ratio, Target, floor_seconds, growth, interval, row, table
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


def test_pinned_memory_of_a_destination_has_to_be_all_of_it():
    reference = [Measured(total=1.0)]
    cell = {"ram": GIB, "content": "idle", "mode": "pin-all", "data": 0}
    for pinned, met in [(GIB + 4096, True), (GIB - 4096, False)]:
        ours = [Measured(total=0.4, pinned=pinned)]
        found = row(cell, ("ours", "ours"), ours, reference, [FloorRound(0.4, 0.2)], [0.0])
        assert [t["met"] for t in found["targets"] if t["what"] == "pinned"] == [met]
        assert {t["what"] for t in found["targets"]} == {"floor", "qemu", "pinned"}


def test_zeros_that_are_assumed_have_a_target_of_their_own():
    cell = {"ram": GIB, "content": "idle", "mode": "dynamic", "data": 0}
    measured = ([Measured(total=0.1)], [Measured(total=1.0)], [FloorRound(0.4, 0.2)], [0.0])
    for pair, limit in [(ASSUMING, 0.03), (("ours", "qemu"), 0.35)]:
        found = row(cell, pair, *measured)
        assert [(t["what"], t["limit"]) for t in found["targets"]] == [("qemu", limit)]


@pytest.mark.parametrize(("user", "shown"), [(0.25, "0.25 + 1.00"), (0.0, "1.00")])
def test_cpu_seconds_are_told_apart_where_the_kernel_does(user, shown):
    cell = {"ram": GIB, "content": "idle", "mode": "dynamic", "data": 0}
    busy = [Measured(total=1.0, user=user, system=1.0)]
    found = row(cell, ("ours", "ours"), busy, busy, [FloorRound(0.4, 0.2)], [0.0])
    assert found["system_seconds_per_gib"] == (1.0 if user else None)
    assert f"| {shown} |" in table([found])


def test_growth_compares_the_pace_of_the_largest_with_that_of_the_smallest():
    def of(ram: int, total: float, mode: str = "pin-all", content: str = "random"):
        ends = {"source": "ours", "destination": "ours"}
        return {"ram": ram, "mode": mode, "content": content, "median": {"total": total}, **ends}

    rows = [of(GIB, 1.0), of(2 * GIB, 2.2), of(GIB, 1.0, "dynamic"), of(2 * GIB, 2.4, "dynamic")]
    rows += [of(GIB, 1.0, "dynamic", "idle"), of(2 * GIB, 9.0, "dynamic", "idle")]
    found = growth(rows)
    assert [(round(row["value"], 2), row["met"]) for row in found] == [(1.2, False), (1.1, True)]
