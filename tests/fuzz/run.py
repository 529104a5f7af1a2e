# SPDX-License-Identifier: Apache-2.0
"""Fuzz the decoders, guided by coverage: ``make fuzz SECONDS_EACH=60``.

    run.py [--seconds N] [--keep] [TARGET...]

Each target runs for N seconds in a process of its own, with 512 MiB of memory at most. A failure is
printed, kept in ``corpus/``, and ends in exit status 1. With ``--keep`` the smallest set of inputs
that reaches all that was reached is kept too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

_MEMORY_MIB = 512
_INPUT_SECONDS = 5
_DONE = re.compile(r"Done (\d+) runs in (\d+) second")
_COVERAGE = re.compile(r"cov: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments, engine = parser.parse_known_args()
    if arguments.one:
        return _engine(arguments.targets[0], engine)
    from targets import TARGETS

    failed = False
    for name in arguments.targets or list(TARGETS):
        failed |= not _fuzz(name, arguments.seconds, keep=arguments.keep)
    return int(failed)


def _engine(name: str, options: list[str]) -> int:
    """Be the process that is fuzzed."""
    import atheris

    with atheris.instrument_imports(include=["rdma_mig"]):
        from targets import TARGETS
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()
    return 0


def _run(name: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, "--one", name, *map(str, options)],
        check=False, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip


def _fuzz(name: str, seconds: int, *, keep: bool) -> bool:
    import corpus

    with tempfile.TemporaryDirectory() as directory:
        inputs, found = Path(directory, "inputs"), Path(directory, "found")
        inputs.mkdir()
        found.mkdir()
        for number, data in enumerate(
            [*corpus.seeds(name), *corpus.recorded(name), *corpus.kept(name)]
        ):
            (inputs / f"{number}").write_bytes(data)
        result = _run(
            name, f"-max_total_time={seconds}", f"-rss_limit_mb={_MEMORY_MIB}",
            f"-timeout={_INPUT_SECONDS}", f"-artifact_prefix={found}/", inputs,
        )  # fmt: skip
        told = result.stdout + result.stderr
        failures = [path.read_bytes() for path in found.iterdir()]
        done, covered = _DONE.search(told), _COVERAGE.findall(told)
        print(
            f"{name}: {done[1] if done else '?'} inputs in {done[2] if done else '?'} s, "
            f"{covered[-1] if covered else '?'} branches, "
            + ("failed" if failures or result.returncode else "nothing found"),
            flush=True,
        )
        if failures or result.returncode:
            print(told[-6000:], file=sys.stderr)
            corpus.keep(name, failures)
            return False
        if keep:
            corpus.keep(name, _least(name, [path.read_bytes() for path in inputs.iterdir()]))
    return True


def _least(name: str, inputs: list[bytes]) -> list[bytes]:
    """The inputs, shortest first, that reach a step from line to line that no other did."""
    from targets import TARGETS

    reached: set[tuple[str, int, int]] = set()

    def steps_of(data: bytes) -> set[tuple[str, int, int]]:
        steps: set[tuple[str, int, int]] = set()

        def enter(frame: FrameType, _event: str, _argument: object) -> Any:
            if "rdma_mig" not in frame.f_code.co_filename:
                return None
            before = frame.f_lineno

            def line(frame: FrameType, _event: str, _argument: object) -> Any:
                nonlocal before
                steps.add((frame.f_code.co_filename, before, frame.f_lineno))
                before = frame.f_lineno
                return line

            return line

        sys.settrace(enter)
        try:
            TARGETS[name](data)
        finally:
            sys.settrace(None)
        return steps

    least = []
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        steps = steps_of(data)
        if not steps <= reached:
            reached |= steps
            least.append(data)
    return least


if __name__ == "__main__":
    sys.exit(main())
