# SPDX-License-Identifier: Apache-2.0
"""The Cython functions against plain Python, at the edge of memory, without a sanitizer.

In a process of its own: what reaches beyond a buffer dies of SIGSEGV.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("buffers.py")


def run(*lines: str) -> subprocess.CompletedProcess[str]:
    code = "\n".join([f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})", *lines])
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("trial", ["pages", "writes"])
def test_functions_do_what_plain_python_does(trial):
    done = run(
        "import buffers",
        f"for seed in range(40): buffers.TRIALS[{trial!r}](seed).run(25)",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("at", ["-1", "len(held)"])
def test_a_step_over_either_edge_of_a_buffer_is_seen(at):
    """What the test above relies on."""
    done = run(
        "import buffers, ctypes, random",
        "memory = buffers.Memory(random.Random(1))",
        "while True:",
        "    held = memory.holding(bytes(buffers.PAGE))",
        "    if not isinstance(held, memoryview): continue",
        "    begin = ctypes.addressof(ctypes.c_char.from_buffer(held))",
        f"    ctypes.string_at(begin + {at}, 1)",
    )
    assert done.returncode == -11, done.stderr
