# SPDX-License-Identifier: Apache-2.0
"""The commands that README and CONTRIBUTING show for installing, as they stand there.

What needs root (packages, a soft-RoCE device) is not run here: `make setup` installs the same
packages (test_docs.py), and docker/setup-rxe makes the device (tests/docker).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import packaging_kit as kit
import pytest

pytestmark = pytest.mark.packaging


def shown(document: str, title: str) -> list[str]:
    """The command lines of a section."""
    text = (kit.PROJECT / document).read_text()
    [section] = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## )", text, re.M | re.S)
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def run(lines: list[str], directory: Path) -> str:
    """Run them in one shell, as somebody does who pastes them."""
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd=directory, env=kit.environment(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=kit.SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_commands_of_the_readme(tree: Path, tmp_path: Path):
    lines = shown("README.md", "Install")
    names = [line.split()[0] for line in lines]
    assert names == [
        "apt-get", "/usr/bin/python3", "/opt/rdma-mig/bin/pip", "ln", "rdma-migrate", "modprobe",
    ]  # fmt: skip
    (tmp_path / "bin").mkdir()
    here = [
        line.replace("/opt/rdma-mig", f"{tmp_path}/rdma-mig")
        .replace("/usr/local/bin", f"{tmp_path}/bin")
        .replace("rdma-migrate --version", f"{tmp_path}/bin/rdma-migrate --version")
        for line in lines[1:-1]
    ]
    said = run(here, tree).splitlines()[-1]
    assert said == f"rdma-migrate {kit.source_version()} (with RDMA layer, pyverbs found)"


@pytest.mark.full
def test_commands_of_contributing(tree: Path, tmp_path: Path):
    """Setting up by hand, and the first round of tests there."""
    by_make, *by_hand = shown("CONTRIBUTING.md", "Set up")
    assert by_make == "make setup"
    tests = next(line for line in shown("CONTRIBUTING.md", "Edit and test") if "pytest" in line)
    copy = tmp_path / "rdma-mig"
    kit.check(["git", "clone", "--quiet", tree, copy])
    run([*by_hand, f"{tests} --collect-only -q", "rdma-migrate --version"], copy)
