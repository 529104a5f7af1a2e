# SPDX-License-Identifier: Apache-2.0
"""Completion: what the shell is told of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("rdma-migrate")


def offered(line: str) -> set[str]:
    """What the shell is given to complete a line with."""
    read, write = os.pipe()
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " ",
        "_ARGCOMPLETE_IFS": "\n",
    }
    # It answers on descriptor 8.
    command = ["bash", "-c", f'exec "$0" 8>&{write} {write}>&-', COMMAND]
    with os.fdopen(read) as answer:
        subprocess.run(command, env=os.environ | asked, pass_fds=[write], check=True, timeout=60)
        os.close(write)
        return {word.strip() for word in answer.read().split("\n")} - {""}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("rdma-migrate in", {"incoming", "inspect"}),
        ("rdma-migrate incoming --sy", {"--sync"}),
        ("rdma-migrate incoming --sync ", {"before", "after"}),
    ],
)
def test_completion(line, wanted):
    assert wanted <= offered(line)
    if not line.endswith(" "):
        assert all(word.startswith(line.split()[-1]) for word in offered(line))
