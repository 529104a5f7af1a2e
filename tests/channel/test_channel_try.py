# SPDX-License-Identifier: Apache-2.0
"""`make try`: what a stranger runs first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TRY = Path(__file__).resolve().parents[2] / "demo" / "try"


def test_the_first_try_works_and_takes_seconds():
    done = subprocess.run(
        [sys.executable, TRY], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    left, on, seconds = re.fullmatch(
        r"the guest left at (\d+) and goes on at (\d+); its RAM is whole \(.*\); ([0-9.]+) s", last
    ).groups()
    assert int(on) > int(left) > 0
    assert float(seconds) < 20
