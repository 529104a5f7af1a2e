# SPDX-License-Identifier: Apache-2.0
"""How the packaging tests build, install and run things."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
SECONDS = 300
"""Limit on any one command; a build takes some 30 s of processor time."""

_NOT_SOURCE = {".git", ".venv", ".lab", "build", "dist", "test-logs"}


def not_source(folder: str, names: list[str]) -> set[str]:
    """For shutil.copytree: the large folders that .gitignore names, and all caches."""
    caches = {name for name in names if name.endswith("_cache") or name == "__pycache__"}
    at_top = Path(folder) == PROJECT
    return caches | {name for name in names if at_top and name in {*_NOT_SOURCE, ".hypothesis"}}


def litter(tree: Path) -> Iterator[Path]:
    """Files that building and testing leave behind, and that belong into no archive."""
    for package in [tree / "rdma_mig", *sorted((tree / "rdma_mig").rglob("*/"))]:
        yield package / "__pycache__" / "left.cpython-311.pyc"
    for name in (
        "build/cp311/left.o",
        "dist/left.whl",
        "tests/__pycache__/left.pyc",
        "test-logs/left.log",
        ".lab/left.log",
        ".venv/pyvenv.cfg",
        ".hypothesis/left",
        ".ruff_cache/left",
    ):
        yield tree / name


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what would lead a Python elsewhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "MESONPY", "RDMA_MIG", "GIT_")) and name != "VIRTUAL_ENV"
    }
    # meson finds cython and ninja by PATH.
    tools = f"{Path(PYTHON).parent}:{kept.get('PATH', os.defpath)}"
    return {**kept, "PATH": tools, "LC_ALL": "C.UTF-8", **more}


def check(command: Sequence[str | Path], **options: object) -> str:
    """Run a command that must succeed; return what it wrote to standard output."""
    options.setdefault("env", environment())
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source: Path, out: Path, verbs: str) -> Path:
    """Build a wheel with this environment's tools."""
    pip = [PYTHON, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    check([*pip, f"--config-settings=setup-args=-Dverbs={verbs}", "--wheel-dir", out, source])
    (found,) = out.iterdir()
    return found


def make_venv(path: Path, *, system_packages: bool) -> Path:
    """Make a virtual environment of the base Python, without pip; return its python."""
    options = ["--without-pip", *(["--system-site-packages"] if system_packages else [])]
    check([PYTHON, "-m", "venv", *options, path])
    return path / "bin" / "python"


def install(python: Path, *what: str | Path, **options: object) -> None:
    """Install into the environment of another Python, dependencies from the package index."""
    check([PYTHON, "-m", "pip", "--python", python, "install", "--quiet", *what], **options)


def source_version() -> str:
    """The version as meson.build states it, the one place that does."""
    for line in (PROJECT / "meson.build").read_text().splitlines():
        word, _, value = line.strip().partition(":")
        if word == "version":
            return value.strip(" ',")
    raise AssertionError("meson.build states no version")
