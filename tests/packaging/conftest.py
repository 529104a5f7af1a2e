# SPDX-License-Identifier: Apache-2.0
"""The sdist and the wheels, each built once a session from a copy of the working tree.

The copy holds what git would take up now, committed or not, and the litter of a working day: so
what is under test is the tree at hand, and the checkout's own build folder stays as it is. The
build tools are those of this environment; only ``xxhash`` comes from a package index.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import packaging_kit as kit
import pytest


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as a git checkout, with litter in it."""
    if shutil.which("git") is None:
        pytest.fail("git is missing, which sdists are made with: apt-get install git")
    copy = tmp_path_factory.mktemp("source") / "rdma-mig"
    shutil.copytree(kit.PROJECT, copy, ignore=kit.not_source, symlinks=True)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    kit.check([*git, "init", "--quiet", "."], cwd=copy)
    kit.check([*git, "add", "--all"], cwd=copy)
    kit.check([*git, "commit", "--quiet", "--no-gpg-sign", "-m", "the tree at hand"], cwd=copy)
    for litter in kit.litter(copy):
        litter.parent.mkdir(parents=True, exist_ok=True)
        litter.write_bytes(b"litter")
    return copy


@pytest.fixture(scope="session")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the tree."""
    out = tmp_path_factory.mktemp("sdist")
    build = f"import mesonpy; mesonpy.build_sdist({str(out)!r})"
    kit.check([kit.PYTHON, "-c", build], cwd=tree)
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ordinary wheel, built from the sdist as ``pip install`` does it."""
    return kit.build_wheel(sdist, tmp_path_factory.mktemp("wheel"), "enabled")


@pytest.fixture(scope="session")
def bare_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without the RDMA layer, built from the littered tree."""
    return kit.build_wheel(tree, tmp_path_factory.mktemp("bare-wheel"), "disabled")
