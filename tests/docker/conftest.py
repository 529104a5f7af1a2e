# SPDX-License-Identifier: Apache-2.0
"""Makes ``import docker_kit`` and ``import harness`` work."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_TESTS))
sys.path.insert(0, str(_TESTS / "docker"))
