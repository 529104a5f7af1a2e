# SPDX-License-Identifier: Apache-2.0
"""An engine in Cython, compiled against this package as its author would do it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

_PROJECT = Path(__file__).resolve().parents[2]


def compiled(source: Path, directory: Path) -> ModuleType:
    """Compile a .pyx, with the products in a directory, and import it; needs a C compiler."""
    c, library = directory / f"{source.stem}.c", directory / f"{source.stem}.so"
    subprocess.run([sys.executable, "-m", "cython", "-I", _PROJECT, "-o", c, source], check=True)
    include = sysconfig.get_paths()["include"]
    subprocess.run(
        ["cc", "-O2", "-fPIC", "-shared", "-w", f"-I{include}", "-o", library, c], check=True
    )
    spec = importlib.util.spec_from_file_location(source.stem, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
