# SPDX-License-Identifier: Apache-2.0
"""What `make bench` runs (docs/performance.md), small: every contender, over the device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import patience

pytestmark = [pytest.mark.rdma, pytest.mark.qemu, pytest.mark.deadline(300)]

RUN = Path(__file__).resolve().parents[1] / "bench" / "run.py"


def test_every_contender_is_measured_beside_the_floor(tmp_path: Path):
    line = "--ram 64M --content half --mode dynamic --rounds 1"
    done = subprocess.run(
        [sys.executable, RUN, *line.split(), "--out", tmp_path],
        capture_output=True, text=True, timeout=patience(200), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every byte equal") == 4
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["about"]["qemu"].startswith("QEMU")
    ends = [(row["source"], row["destination"]) for row in report["rows"]]
    assert sorted(ends) == [(a, b) for a in ("ours", "qemu") for b in ("ours", "qemu")]
    for row in report["rows"]:
        assert 0 < row["median"]["transfer"] < row["median"]["total"]
        assert row["ratios"]["floor"]["median"] > 0
        assert row["ratios"]["writes"]["median"] > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "| 64 MiB | half | dynamic | qemu | qemu |" in (tmp_path / "bench.md").read_text()
