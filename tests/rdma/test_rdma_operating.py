# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/operating.md, as they stand there, on a host with a device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.rdma

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "operating.md"
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_operating_guide(command):
    done = subprocess.run(
        ["bash", "-c", f'PATH="{Path(sys.executable).parent}:/usr/sbin:/sbin:$PATH"; {command}'],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    if not command.startswith("rdma-migrate clean"):
        assert done.stdout.strip()
