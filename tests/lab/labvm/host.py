# SPDX-License-Identifier: Apache-2.0
"""What the lab needs from the machine it runs on, and where it keeps things there."""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
CACHE = PROJECT / ".lab"

# Program -> the Debian package that brings it.
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "depmod": "kmod",
    "ip": "iproute2",
    "rdma": "iproute2",
    "setpriv": "util-linux",
    "bash": "bash",
}


class LabError(Exception):
    """The lab did not start: which step failed, and why."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")


def find(program: str) -> str | None:
    """Return the program's path; the system directories count even where PATH lacks them."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(program, path=f"{path}:/usr/sbin:/usr/bin:/sbin:/bin")


def need(program: str) -> str:
    """Return the program's path, or raise LabError with the command that installs it."""
    found = find(program)
    if found is None:
        raise missing([program])
    return found


def missing(programs: list[str]) -> LabError:
    packages = " ".join(sorted({TOOLS.get(p, p) for p in programs}))
    return LabError("host", f"{', '.join(programs)} not found: apt-get install {packages}")


def check() -> None:
    """Raise LabError unless everything that the lab uses is on this machine."""
    if os.uname().machine != "x86_64":
        raise LabError("host", f"the lab runs on x86_64 only, this machine is {os.uname().machine}")
    absent = [program for program in TOOLS if find(program) is None]
    if absent:
        raise missing(absent)
    # Only a static busybox runs in an initramfs without libraries; the loader's name is in the
    # first page of any program that needs one.
    if b"/ld-linux" in Path(need("busybox")).read_bytes()[:4096]:
        raise LabError("host", "busybox is not static: apt-get install busybox-static")


def run(step: str, command: list[str], cwd: Path | None = None) -> str:
    """Run a command and return what it prints; where it fails, LabError with its last line."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        why = said[-1] if said else f"status {done.returncode}"
        raise LabError(step, f"{Path(command[0]).name} {command[1]}: {why}")
    return done.stdout


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold `.lab/NAME.lock`, so that labs started at once prepare a thing only once."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
