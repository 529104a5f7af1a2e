# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/quick-start.md, one after the other as they stand there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from harness import qemu_binary

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quick-start.md"


def test_commands_of_the_quick_start(tmp_path: Path):
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).splitlines()
    assert {line.split()[1] for line in lines if line.startswith("rdma-migrate ")} == {
        "doctor", "checkpoint", "inspect", "restore",
    }  # fmt: skip
    room = tmp_path / "quick"
    places = [Path(sys.executable).parent, Path(qemu_binary()).parent, os.environ["PATH"]]
    environment = os.environ | {"PATH": ":".join(map(str, places))}
    try:
        for line in lines:
            done = subprocess.run(
                ["bash", "-c", line.replace("/tmp/quick", str(room))],
                env=environment, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            # Where nothing but RDMA is missing, the page says to go on.
            allowed = (0, 3) if " doctor " in line else (0,)
            assert done.returncode in allowed, f"{line}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr
            if " restore " in line:
                assert "second.qmp is running\n" in done.stdout + done.stderr, done
        assert not room.exists()
    finally:
        for left in room.glob("*.pid"):
            os.kill(int(left.read_text()), signal.SIGKILL)
