# SPDX-License-Identifier: Apache-2.0
"""Two hundred migrations in one process, half of them failing at random steps, leave nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import rdma_kit as kit
import rdma_soak

pytestmark = pytest.mark.rdma


@pytest.mark.deadline(300)
def test_two_hundred_migrations_leave_nothing():
    # In a process of its own: what tests before have left free in this one's heap is no measure.
    done = subprocess.run(
        [sys.executable, rdma_soak.__file__, "--runs", "200", "--seed", "1", "--json"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    report = rdma_soak.Report(**json.loads(done.stdout))
    assert report.runs == 200
    assert report.wrong == []
    assert report.hangs == []
    assert report.leaks == {}
    # Half of them, as the dice fall.
    assert 60 < report.failed < 180
    # A migration has 8 MiB of RAM and 2.5 MiB of buffers: one in a hundred would show.
    assert report.grown_late_kib <= report.most_late_kib


def test_what_is_left_is_noticed(address: str, tmp_path):
    """The count counts: each kind of thing that is left, is seen."""
    before = rdma_soak.traces(tmp_path)
    with kit.RawListener() as listener, (tmp_path / "file").open("w"):
        worker = kit.Worker(listener.accept)
        with kit.dial(listener.uri):
            worker.result()
            now = rdma_soak.traces(tmp_path)
    more = {kind for kind, count in now.items() if count > before[kind]}
    assert {"qp", "cq", "mr", "pd", "cm_id", "descriptor", "file"} <= more
