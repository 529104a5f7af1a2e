# SPDX-License-Identifier: Apache-2.0
"""All tests: those that run anywhere on this machine, those that need a device where one is.

The device part runs on this machine where RDMA_MIG_DEVICE names its device, else in one boot of
the lab, or in another lab that RDMA_MIG_LAB is the command of: it runs the command behind it, on
this machine's files, with test-logs/ writable, where RDMA_MIG_DEVICE (else rxe0) is. Arguments are
passed on to pytest; paths and -k select from both parts (-m would undo the division between them).
Started by `make test` and `make test-full`.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import summary

PROJECT = Path(__file__).resolve().parents[2]
LOGS = PROJECT / "test-logs"
# Tests with these marks need what only the lab (or a host with a device, as root) has.
DEVICE_MARKS = "(rdma or qemu or root)"
# What remains after pytest is told to stop, for its report and the lab's end.
GRACE_SECONDS = 40.0
# How much longer than pytest's own limit the lab lives: its boot, on a busy machine, comes before.
BOOT_SECONDS = 120.0


def pytest_command(marks: str, junit: Path, seconds: float, arguments: list[str]) -> list[str]:
    """Return the command; `timeout` interrupts pytest, so that it still writes its results."""
    limit = ["timeout", "--signal=INT", f"--kill-after={GRACE_SECONDS / 2:g}", f"{seconds:.0f}"]
    pytest = [sys.executable, "-m", "pytest", "-m", marks, f"--junitxml={junit}"]
    return [*limit, *pytest, "-p", "no:cacheprovider", *arguments]


def lab_command(seconds: float, command: list[str]) -> list[str]:
    console = LOGS / "console.log"
    options = ["--share", str(LOGS), "--log", str(console)]
    limit = ["--timeout", f"{seconds + BOOT_SECONDS:.0f}"]
    return [str(PROJECT / "tests" / "lab" / "run"), *options, *limit, "--", *command]


def staged() -> dict[str, str]:
    """Install what the editable install has built into `.lab/stage`; return what selects it.

    An editable install looks for changed sources in each process that imports it, which takes
    seconds where the processor is emulated. It also hides a file that the installation forgets.
    """
    target = PROJECT / ".lab" / "stage"
    shutil.rmtree(target, ignore_errors=True)
    # The import rebuilds what has changed.
    which = (
        "import rdma_mig, sys\n"
        "print(*{f._build_path for f in sys.meta_path if hasattr(f, '_build_path')}, sep='\\n')"
    )
    python = [sys.executable, "-c", which]
    said = subprocess.run(python, cwd="/", check=False, stdout=subprocess.PIPE, text=True)
    build = said.stdout.strip()
    if said.returncode or not Path(build, "build.ninja").is_file():
        sys.exit("suite: no editable install that works: rm .venv/.setup && make setup")
    meson = [sys.executable, "-m", "mesonbuild.mesonmain", "install", "-C", build]
    subprocess.run([*meson, "--no-rebuild", "--quiet", "--destdir", str(target)], check=True)
    packages = [path.parent.parent for path in target.rglob("rdma_mig/__init__.py")]
    if len(packages) != 1:
        sys.exit(f"suite: {len(packages)} packages below {target} after meson install")
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(packages[0])], check=True)
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(packages[0]), *([before] if before else [])])
    # The sources, without their extension modules, lie in the directory that tests run in: it is
    # not to come first.
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "MESONPY_EDITABLE_SKIP": build}


def collected(marks: str, arguments: list[str]) -> tuple[int, list[str]]:
    """Return pytest's status and the files whose tests are wanted: emulated, importing the others
    would take a minute, and booting a lab for none of them longer."""
    pytest = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-m", marks, "--no-header"]
    done = subprocess.run(
        [*pytest, "-p", "no:cacheprovider", *arguments],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, summary.NO_TESTS):
        print(done.stdout, flush=True)
    found = re.findall(r"^(tests/\S+\.py)(?:::|: \d+$)", done.stdout, re.MULTILINE)
    return done.returncode, sorted(set(found))


class Run:
    """One part under way: its output goes to the terminal, or to ``log`` until it is joined."""

    def __init__(
        self, label: str, command: list[str], junit: Path, *, selected: bool, log: Path | None
    ) -> None:
        self.label, self.junit, self.selected, self.log = label, junit, selected, log
        junit.unlink(missing_ok=True)
        self.began = time.monotonic()
        if log is None:
            print(f"==== {label} ====", flush=True)
        with open(log, "wb") if log else contextlib.nullcontext() as output:
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
            )

    def join(self) -> summary.Part:
        status = self.process.wait()
        seconds = time.monotonic() - self.began
        if self.log is not None:
            print(f"==== {self.label} ====", self.log.read_text(errors="replace"), sep="\n")
        # As a shell counts: a process that a signal ended.
        status = 128 - status if status < 0 else status
        return summary.read(self.label, status, seconds, self.junit, may_be_empty=self.selected)

    def stop(self) -> None:
        """End it where it still runs: `timeout` and the lab pass a SIGTERM on."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def device_part(wanted: str, selected: bool, deadline: float, passed_on: list[str]) -> summary.Part:
    """Run the tests that need a device, where there is one."""
    device = LOGS / "device.xml"
    marks = f"{DEVICE_MARKS}{wanted}"
    named = os.environ.get("RDMA_MIG_DEVICE")
    label = f"device {named}" if named else "lab"
    if os.environ.get("RDMA_MIG_LAB"):
        label = "other lab"
    status, files = collected(marks, passed_on)
    if status:
        device.unlink(missing_ok=True)
        return summary.read(label, status, 0.0, device, may_be_empty=selected)
    arguments = passed_on if selected else files
    left = max(deadline - time.monotonic(), 2 * GRACE_SECONDS)
    command = pytest_command(marks, device, left - GRACE_SECONDS, arguments)
    other = os.environ.get("RDMA_MIG_LAB")
    if other:
        # It may hand on little of our environment, so all that counts goes with the command.
        kept = ("MESONPY_EDITABLE_SKIP", "PYTHONPATH", "PYTHONSAFEPATH")
        settings = [f"{name}={os.environ[name]}" for name in kept]
        device_name = f"RDMA_MIG_DEVICE={named or 'rxe0'}"
        command = [*shlex.split(other), "env", device_name, *settings, *command]
    elif not named:
        command = lab_command(left, command)
    run = Run(label, command, device, selected=selected, log=None)
    try:
        return run.join()
    finally:
        run.stop()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="also the tests marked `full`")
    # Fifteen minutes are what it should take on two emulated processors. The limit is for runs that
    # hang: a machine that is busy with other things is no reason to call the tests failed.
    parser.add_argument("--limit", type=float, default=2400, help="seconds (default %(default)s)")
    options, passed_on = parser.parse_known_args(arguments)
    LOGS.mkdir(exist_ok=True)
    deadline = time.monotonic() + options.limit
    wanted = "" if options.full else " and not full"
    selected = bool(passed_on)
    os.environ.update(staged())
    # The lab, where compiling is slow, finds what this machine has compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    # Beside the lab, whose nested emulation keeps little more than one processor busy.
    xml = LOGS / "native.xml"
    marks = f"not {DEVICE_MARKS}{wanted}"
    command = pytest_command(marks, xml, options.limit - GRACE_SECONDS, passed_on)
    native = Run("native", command, xml, selected=selected, log=LOGS / "native.log")
    try:
        parts = [device_part(wanted, selected, deadline, passed_on)]
        parts.insert(0, native.join())
    finally:
        native.stop()

    lines, status = summary.report(parts)
    print("==== summary ====", *lines, sep="\n", flush=True)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
