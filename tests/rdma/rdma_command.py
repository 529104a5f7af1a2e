# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate`` as an operator runs it, on a host that is arranged for the test."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rdma_kit as kit
from harness.output import check_output

COMMAND = str(Path(sys.executable).with_name("rdma-migrate"))


def replaced(files: dict[str, Path]) -> list[str]:
    """A prefix for a command that shall see other files in these places."""
    mounts = "; ".join(
        f"mount --bind {shlex.quote(str(new))} {shlex.quote(old)}" for old, new in files.items()
    )
    return [
        "unshare", "--mount", "--propagation", "private",
        "sh", "-ec", f'{mounts}; exec "$@"', "replaced",
    ]  # fmt: skip


def run(*arguments: str | Path, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [*prefix, COMMAND, *map(str, arguments)],
        check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        timeout=kit.patience(60),
    )  # fmt: skip


def failed(result: subprocess.CompletedProcess[str], status: int) -> str:
    """Return the one line that it says why it failed in."""
    told = f"{result.returncode}: {result.stdout}{result.stderr}"
    assert result.returncode == status, told
    assert "Traceback" not in result.stderr, told
    lines = [line for line in result.stderr.splitlines() if line.startswith("rdma-migrate:")]
    lines = [line for line in lines if not line.startswith("rdma-migrate: warning:")]
    assert len(lines) == 1, told
    return lines[0]


@contextlib.contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Start it; what it says is for interrupted() to read."""
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupted(process: subprocess.Popen[str], number: int) -> str:
    """Send it a signal; return the one line that it ends in, with status 5 and in two seconds."""
    began = time.monotonic()
    process.send_signal(number)
    output, told = process.communicate(timeout=kit.patience(30))
    took = time.monotonic() - began
    assert took < kit.patience(2), f"it took {took:.2f} s"
    return failed(subprocess.CompletedProcess([], process.returncode, output, told), 5)


class Incoming:
    """``rdma-migrate incoming --json`` at work; events() when it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], before: list[dict[str, Any]]) -> None:
        self.process = process
        self.before = before
        self.uri = str(before[-1]["uri"])

    def events(self) -> list[dict[str, Any]]:
        """Wait for its end, which must be exit status 0, and return all events."""
        output, _ = self.process.communicate(timeout=kit.patience(30))
        assert self.process.returncode == 0, output
        return [
            check_output("event", event)
            for event in [*self.before, *map(json.loads, output.splitlines())]
        ]


@contextlib.contextmanager
def incoming(
    uri: str, output: Path, *options: str, prefix: Sequence[str] = ()
) -> Iterator[Incoming]:
    """Start a destination, and wait until it listens."""
    # Without a buffer: communicate() does not see what one has read ahead.
    process = subprocess.Popen(
        [*prefix, COMMAND, "incoming", uri, "-o", output, "--json", *options],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    try:
        told: list[dict[str, Any]] = []
        while not told or told[-1]["event"] != "listening":
            line = process.stdout.readline()
            assert line, "it ended before it listened"
            told.append(json.loads(line))
        yield Incoming(process, told)
    finally:
        process.kill()
        process.communicate()


def event(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The only event of this name."""
    (found,) = [each for each in events if each["event"] == name]
    return found
