# SPDX-License-Identifier: Apache-2.0
"""When a guest is throttled, and by how much: as a QEMU does by default."""

from __future__ import annotations

from rdma_mig.migration.pace import AutoConverge

MIB = 1 << 20


def test_every_second_bad_period_is_a_step_up_to_99():
    converge = AutoConverge()
    steps = []
    for _ in range(30):
        if converge.evaluate(51 * MIB, 100 * MIB):
            steps.append(converge.percentage)
    assert steps == [20, 30, 40, 50, 60, 70, 80, 90, 99]


def test_half_of_what_was_sent_is_not_too_much():
    converge = AutoConverge()
    assert not any(converge.evaluate(50 * MIB, 100 * MIB) for _ in range(9))


def test_good_periods_between_neither_count_nor_make_up():
    converge = AutoConverge()
    assert not converge.evaluate(90, 100)
    assert not converge.evaluate(0, 100)
    assert converge.evaluate(90, 100)
    assert converge.percentage == 20
    assert not converge.evaluate(0, 100)
    assert converge.percentage == 20
