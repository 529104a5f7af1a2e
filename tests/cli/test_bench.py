# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate bench``: its arithmetic, and what it says before anything is measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.errors import LocalProtocolError
from rdma_mig.host.prediction import Path as Way
from rdma_mig.host.prediction import advise, predict

COMMAND = Path(sys.executable).with_name("rdma-migrate")
GIB = 1 << 30
RDMA = Way("RDMA", 4e9, 0.1 / GIB, 0.01)
TCP = Way("TCP", 1e9, 0.0, 0.01)


def test_guest_that_writes_nothing():
    found = predict(RDMA, 8 * GIB, 0, 0.3)
    assert found.converges
    assert found.setup_seconds == pytest.approx(0.8)
    assert found.total_seconds == pytest.approx(0.8 + 8 * GIB / 4e9 + 0.01)
    assert (found.downtime_seconds, found.passes) == (0.01, 1)


def test_passes_shrink_by_the_ratio_of_the_rates():
    """4 s, then half of it each time, until the rest fits into 290 ms."""
    found = predict(Way("TCP", 1e9, 0.0, 0.01), 4 * 10**9, 0.5e9, 0.3)
    assert found.converges
    # 4 + 2 + 1 + 0.5, and 0.25 with the guest at rest.
    assert found.total_seconds == pytest.approx(7.75 + 0.01)
    assert found.downtime_seconds == pytest.approx(0.26)
    assert found.passes == 5


@given(
    ram=st.integers(1 << 20, 1 << 42),
    rate=st.floats(1e6, 1e11),
    dirty=st.floats(0, 1e11),
    downtime=st.floats(0.01, 10),
)
def test_what_holds_of_every_prediction(ram, rate, dirty, downtime):
    found = predict(Way("RDMA", rate, 0.05 / GIB, 0.002), ram, dirty, downtime)
    assert found.total_seconds >= found.setup_seconds + ram / rate
    assert found.total_seconds <= found.setup_seconds + 101 * ram / rate + 0.01
    if found.converges:
        assert found.downtime_seconds <= max(downtime, 0.002) * 1.000001
    else:
        assert found.downtime_seconds > downtime * 0.999999
    if dirty < rate * 0.8 and downtime > 0.1:
        assert found.converges


def test_rate_of_nothing_is_refused():
    with pytest.raises(LocalProtocolError):
        Way("RDMA", 0.0)


@pytest.mark.parametrize(
    ("ram", "dirty", "said"),
    [
        (64 * GIB, 0.5e9, "RDMA: "),
        (64 * GIB, 2e9, "RDMA: it converges, with"),
        (64 * GIB, 9e9, "neither converges"),
    ],
)
def test_advice(ram, dirty, said):
    sentence = advise(*(predict(way, ram, dirty, 0.3) for way in (RDMA, TCP)))
    assert sentence.startswith(said)
    assert "\n" not in sentence


def test_advice_for_tcp_where_preparing_memory_costs_more_than_it_saves():
    slow = Way("RDMA", 1.1e9, 1.0 / GIB, 0.01)
    assert advise(*(predict(way, GIB, 0, 0.3) for way in (slow, TCP))).startswith("TCP: ")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "bench", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["h", "--serve"], ["h", "-q", "65"], ["h", "-q", "0"], ["h", "-n", "x"],
        ["h", "-s", "1G"], ["h", "--downtime", "-1"], ["h", "--ram", "much"],
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
