# SPDX-License-Identifier: Apache-2.0
"""What `make bench` runs (docs/performance.md), small: every contender, over the device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import device_address
from support import MIB, patience

pytestmark = [pytest.mark.rdma, pytest.mark.qemu, pytest.mark.deadline(300)]

RUN = Path(__file__).resolve().parents[1] / "bench" / "run.py"
sys.path.append(str(RUN.parent))

import live  # noqa: E402
from floor import Floor  # noqa: E402


def test_every_contender_is_measured_beside_the_floor(tmp_path: Path):
    line = "--ram 64M --content half --mode dynamic --rounds 1 --no-live"
    done = subprocess.run(
        [sys.executable, RUN, *line.split(), "--out", tmp_path],
        capture_output=True, text=True, timeout=patience(200), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every byte equal") == 4
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["about"]["qemu"].startswith("QEMU")
    assert report["about"]["filesystem"]
    ends = [(row["source"], row["destination"]) for row in report["rows"]]
    assert sorted(ends) == [(a, b) for a in ("ours", "qemu") for b in ("ours", "qemu")]
    for row in report["rows"]:
        assert 0 < row["median"]["transfer"] < row["median"]["total"]
        assert row["ratios"]["floor"]["median"] > 0
        assert row["ratios"]["writes"]["median"] > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "| 64 MiB | half | dynamic | qemu | qemu |" in (tmp_path / "bench.md").read_text()


def test_guests_that_dirty_memory_alike_rest_for_a_moment(monkeypatch: pytest.MonkeyPatch):
    """The warm-up compares the counters that both guests leave at the other end."""
    monkeypatch.setattr(live, "RAM", 96 * MIB)
    monkeypatch.setattr(live, "DIRTY", 8 * MIB)
    with Floor(device_address()[1]) as floor:
        (row,) = live.measure(floor, ["dynamic"], 1, print)
    print(row)
    for found in (row["rounds"]["qemu"], row["rounds"]["ours"]):
        assert 0 < found[0]["seen"] < patience(5)
        assert found[0]["pace"] > 0
    assert row["limit"] == 1.0
