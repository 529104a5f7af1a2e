# SPDX-License-Identifier: Apache-2.0
"""The Cython code built by clang with AddressSanitizer and UBSan, and tried: part of ``make fuzz``.

    sanitize.py [--seconds N] [--seed S] [--prove]

``--prove`` builds it with a bound left out, and fails unless that is found.
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
_MODULES = ("_pages",)
_FLAGS = [
    "-O1", "-g", "-fPIC", "-shared", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined", "-fno-sanitize=function", "-shared-libasan",
    # Cython's own code compares and casts as it likes.
    "-fno-sanitize=alignment", "-w",
]  # fmt: skip
# What is left out for --prove: the last unit of a buffer may be shorter than the others.
_BOUND = "size = step if step < n - at else n - at"


def _clang() -> str:
    found = shutil.which("clang") or shutil.which("clang-14")
    if not found:
        raise SystemExit("sanitize: no clang here: apt-get install clang libclang-rt-14-dev")
    return found


def _build(clang: str, *, broken: bool) -> Path:
    target = _BUILD / ("broken" if broken else "good")
    target.mkdir(parents=True, exist_ok=True)
    for name in _MODULES:
        folder = target / "cext"
        shutil.copytree(_PROJECT / "cext", folder, dirs_exist_ok=True)
        source = folder / f"{name}.pyx"
        if broken:
            text = source.read_text()
            assert _BOUND in text, "sanitize.py: the bound that --prove leaves out is gone"
            source.write_text(text.replace(_BOUND, "size = step"))
        cython = [sys.executable, "-m", "cython", "-3", "--module-name", f"rdma_mig.{name}"]
        subprocess.run([*cython, source, "-o", target / f"{name}.c"], check=True)
        include = f"-I{sysconfig.get_paths()['include']}"
        output = ["-o", target / f"{name}.so"]
        subprocess.run([clang, *_FLAGS, include, target / f"{name}.c", *output], check=True)
    return target


def _try(clang: str, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(
        [clang, "-print-file-name=libclang_rt.asan-x86_64.so"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python's own pools would hide the edges of small buffers.
        "PYTHONMALLOC": "malloc",
    }
    script = Path(__file__).with_name("buffers.py")
    return subprocess.run(
        [sys.executable, script, *options, directory],
        check=False, capture_output=True, text=True, env=environment,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--prove", action="store_true")
    arguments = parser.parse_args()
    clang = _clang()
    options = [f"--seconds={arguments.seconds}", f"--seed={arguments.seed}"]
    result = _try(clang, _build(clang, broken=arguments.prove), *options)
    found = result.returncode != 0
    if arguments.prove:
        seen = "AddressSanitizer" in result.stderr
        print(f"sanitize: a bound left out was {'found' if seen else 'NOT found'}")
        return int(not seen)
    print(result.stdout, end="")
    if found:
        print(result.stderr[-6000:], file=sys.stderr)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
