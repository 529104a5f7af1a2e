# SPDX-License-Identifier: Apache-2.0
"""The Cython code built by clang with AddressSanitizer and UBSan, and tried: part of ``make fuzz``.

    sanitize.py [--seconds N] [--seed S] [--prove]

All modules are built into a copy of the package. The trials of buffers.py run in it for N seconds,
then the tests of pages, page records, XBZRLE and the mapped trace. ``--prove`` builds it with a
bound left out, once for each kind of trial, and fails unless that is found. What needs a device is
not run: the sanitizer's memory map leaves no room for itself in the faster lab.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2]
_BUILD = _PROJECT / "build" / "sanitized"
_LIBRARIES = {
    "_dirty": [], "_hooks": [], "_mapped": [], "_pages": [], "_stream": [],
    "_verbs": ["-libverbs", "-lrdmacm"],
}  # fmt: skip
_TESTS = (
    "memory/test_memory_pages.py", "memory/test_memory_bitmap.py", "memory/test_page_stream.py",
    "memory/test_xbzrle.py", "cli/test_trace_file.py",
)  # fmt: skip
# What a process dies of that touches memory which is gone is the sanitizer's to say.
_LEFT_OUT = "not other_mapping_that_loses"
_FLAGS = [
    "-O1", "-g", "-fPIC", "-shared", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined", "-fno-sanitize=function", "-shared-libasan",
    # Cython's own code compares and casts as it likes, and adds nothing to NULL.
    "-fno-sanitize=alignment,pointer-overflow", "-w",
]  # fmt: skip
# What is left out for --prove: a trial of buffers.py, the module, the file, and the bound in it.
_BOUNDS = [
    # The last unit of a buffer may be shorter than the others.
    ("pages", "_pages", "_pages.pyx", "size = step if step < n - at else n - at", "size = step"),
    # A chunk behind the last one of its block has no keys.
    ("writes", "_verbs", "write_queue.pxi", " or chunk >= self.targets[block].chunks", ""),
]


def _clang() -> str:
    found = shutil.which("clang") or shutil.which("clang-14")
    if not found:
        raise SystemExit("sanitize: no clang here: apt-get install clang libclang-rt-14-dev")
    return found


def _build(
    clang: str, target: Path, modules: list[str], change: tuple[str, str, str] | None
) -> Path:
    """Build modules into a copy of the package, from a copy of cext with one text changed."""
    shutil.rmtree(target, ignore_errors=True)
    package, sources = target / "rdma_mig", target / "cext"
    shutil.copytree(
        _PROJECT / "rdma_mig", package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copytree(_PROJECT / "cext", sources)
    if change is not None:
        name, bound, instead = change
        text = (sources / name).read_text()
        assert bound in text, f"sanitize.py: the bound in {name} that --prove leaves out is gone"
        (sources / name).write_text(text.replace(bound, instead))
    cython = [sys.executable, "-m", "cython", "-3", "-I", sources, "-I", _PROJECT]
    include = f"-I{sysconfig.get_paths()['include']}"
    for name in modules:
        made = target / f"{name}.c"
        module = ["--module-name", f"rdma_mig.{name}", sources / f"{name}.pyx"]
        subprocess.run([*cython, *module, "-o", made], check=True, capture_output=True)
        output = ["-o", package / f"{name}.so", *_LIBRARIES[name]]
        subprocess.run([clang, *_FLAGS, include, made, *output], check=True)
    return target


def _try(clang: str, directory: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the package in this directory."""
    runtime = subprocess.run(
        [clang, "-print-file-name=libclang_rt.asan-x86_64.so"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # An editable install would be found before the directory.
    editable = [str(f._build_path) for f in sys.meta_path if hasattr(f, "_build_path")]
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python's own pools would hide the edges of small buffers.
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(directory),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MESONPY_EDITABLE_SKIP": os.pathsep.join(editable),
    }
    return subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, env=environment
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--prove", action="store_true")
    arguments = parser.parse_args()
    clang = _clang()
    buffers = [
        Path(__file__).with_name("buffers.py"),
        f"--seconds={arguments.seconds}",
        f"--seed={arguments.seed}",
    ]
    if arguments.prove:
        proved = [_prove(clang, buffers, *bound) for bound in _BOUNDS]
        return int(not all(proved))
    built = _build(clang, _BUILD / "good", list(_LIBRARIES), None)
    tests = [_PROJECT / "tests" / name for name in _TESTS]
    for command in (
        buffers,
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", _LEFT_OUT, *tests],
    ):
        result = _try(clang, built, *command)
        print(result.stdout[-2000:], end="")
        if result.returncode:
            print(result.stderr[-6000:], file=sys.stderr)
            return 1
    return 0


def _prove(
    clang: str, buffers: list[str | Path], trial: str, module: str, file: str, bound: str, less: str
) -> bool:
    broken = _build(clang, _BUILD / f"broken-{trial}", ["_hooks", module], (file, bound, less))
    seen = "AddressSanitizer" in _try(clang, broken, *buffers, f"--only={trial}").stderr
    print(f"sanitize: a bound left out of {file} was {'found' if seen else 'NOT found'}")
    return seen


if __name__ == "__main__":
    sys.exit(main())
