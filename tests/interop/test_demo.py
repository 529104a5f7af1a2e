# SPDX-License-Identifier: Apache-2.0
"""The demonstration holds what it shows, and says so when it does not hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness import Guest, device_address

DEMO = Path(__file__).resolve().parents[2] / "demo" / "run"

# Stands in for rdma-migrate: damages a counter of the snapshot that the real one has written, and
# asks for no digests to be checked, so that only the demonstration's own comparison can see it.
DAMAGING = """\
#!{python}
import subprocess, sys
arguments = [a for a in sys.argv[1:] if a != "--verify"]
fds = [int(arguments[-1])] if "--ready-fd" in arguments else []
status = subprocess.run([{real!r}, *arguments], pass_fds=fds).returncode
if arguments[0] == "incoming" and status == 0:
    with open(arguments[arguments.index("--output") + 1] + "/ram/0.raw", "r+b") as ram:
        ram.seek({offset})
        ram.write(b"\\xff")
sys.exit(status)
"""

WITH_ANOTHER = """\
import runpy, sys
from pathlib import Path
main = runpy.run_path({demo!r})["main"]
main.__globals__["RDMA_MIGRATE"] = Path({program!r})
sys.exit(main())
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, check=False
    )


def test_device_that_is_not_there_ends_in_one_line():
    result = run(DEMO, "--device", "no-such-device")
    assert result.returncode == 1
    assert result.stderr.startswith("demo: FAILED: no verbs device no-such-device on this host")
    assert result.stderr.count("\n") == 1


@pytest.mark.full
@pytest.mark.rdma
@pytest.mark.qemu
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_demonstration_holds(machine):
    result = run(DEMO, "--machine", machine)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "demo: everything was as it should be"


@pytest.mark.full
@pytest.mark.rdma
@pytest.mark.qemu
def test_demonstration_sees_a_damaged_page(tmp_path):
    program = tmp_path / "rdma-migrate"
    real = str(Path(sys.executable).with_name("rdma-migrate"))
    guest = Guest.dirtying(4)
    program.write_text(
        DAMAGING.format(python=sys.executable, real=real, offset=guest.start + 7 * 4096 + 3)
    )
    program.chmod(0o755)
    assert device_address()
    result = run("-c", WITH_ANOTHER.format(demo=str(DEMO), program=str(program)))
    assert result.returncode == 1
    assert "demo: FAILED: RAM blocks of the stopped source QEMU and of the snapshot differ: " in (
        result.stderr
    )
    assert "pc.ram: 1 of 16384 pages differ, the first at 0x1007000" in result.stderr
