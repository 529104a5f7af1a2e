# SPDX-License-Identifier: Apache-2.0
"""The choice of round trips that every run has shows each two values of the matrix together."""

from __future__ import annotations

import runpy
from pathlib import Path

from matrix import cells, pairs

IN_EVERY_RUN = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["IN_EVERY_RUN"]
ROUND_TRIP = "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[{}-small]"


def test_every_run_has_each_pair_of_values():
    chosen = [
        cell for cell in cells() if ROUND_TRIP.format("-".join(cell)).startswith(IN_EVERY_RUN)
    ]
    assert pairs(cells()) - pairs(chosen) == set()
    # Three machines and three kinds of guest: it cannot be fewer, and need not be more.
    assert len(chosen) == 9


def test_choice_that_lacks_a_pair_would_be_found():
    chosen = [cell for cell in cells() if cell[:2] != ("dynamic", "numa")]
    assert pairs(cells()) - pairs(chosen) == {("dynamic", "numa")}
