# SPDX-License-Identifier: Apache-2.0
"""demo/live, as one would run it but for the size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIVE = Path(__file__).resolve().parents[2] / "demo" / "live"


def test_live_demo_moves_a_process_that_goes_on():
    done = subprocess.run(
        [sys.executable, LIVE, "tcp:127.0.0.1:0", "32"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Migration status: completed" in done.stdout
    stopped, now = re.fullmatch(
        r"32 MiB stopped at (\d+) here and are the same there, where it is at (\d+)",
        done.stdout.splitlines()[-1],
    ).groups()
    assert int(now) > int(stopped) > 0
