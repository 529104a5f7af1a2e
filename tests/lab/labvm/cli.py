# SPDX-License-Identifier: Apache-2.0
"""The command line of tests/lab/run."""

import argparse
import contextlib
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from labvm import accel, host, initramfs, kernel
from labvm.host import CACHE, LabError
from labvm.job import guest_files
from labvm.machine import Machine, Output, Settings, TimedOut

TIMED_OUT = 124
NOT_STARTED = 125
KEPT_LOGS = 20
ESCAPE = b"\x1d"  # Ctrl-]
KERNEL_COMPLAINT = re.compile(rb"\b(BUG|WARNING|Oops|Call Trace|soft lockup)\b")

EPILOG = """\
COMMAND runs as root in the caller's directory, on the host's files; what it writes is gone
afterwards, except below the directories given with --share. It gets PATH, HOME, VIRTUAL_ENV, CI
and RDMA_*, PY*, MESONPY_* and HYPOTHESIS_* of the caller, and RDMA_MIG_DEVICE=rxe0.
Exit status: COMMAND's; 124 the time ran out; 125 the lab did not start or broke down."""


class Stopped(Exception):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; `command` is empty for a shell."""
    parser = argparse.ArgumentParser(
        prog="tests/lab/run",
        usage="%(prog)s [OPTION]... -- COMMAND...   (or: --shell)",
        description="Run a command in a virtual machine with a stock Debian kernel and soft-RoCE.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--memory", default="4G", metavar="SIZE", help="such as 4G (default %(default)s)")
    add("--cpus", type=int, default=2, metavar="N", help="processors (default %(default)s)")
    add("--timeout", type=float, default=1800, metavar="SECONDS",
        help="for all, boot included (default %(default)s)")  # fmt: skip
    add("--share", action="append", default=[], type=Path, metavar="DIR",
        help="this directory is the host's own, read-write; may be given again")  # fmt: skip
    add("--log", type=Path, metavar="FILE", help="keep the console log here, whatever happens")
    add("--accel", choices=("auto", "kvm", "tcg"), default=None,
        help="default: RDMA_MIG_LAB_ACCEL, or auto (KVM where a probe booted with it)")  # fmt: skip
    add("--shell", action="store_true", help="give COMMAND (default: a shell) the terminal")
    add("command", nargs="*", metavar="COMMAND", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.command and not options.shell:
        parser.error("no COMMAND")
    if options.shell and not sys.stdin.isatty():
        parser.error("--shell needs a terminal")
    if options.cpus < 1 or options.timeout <= 0:
        parser.error("--cpus and --timeout must be positive")
    if not re.fullmatch(r"[1-9]\d*[MG]", options.memory):
        parser.error("--memory takes a number and M or G, such as 4G")
    if options.accel is None:
        options.accel = os.environ.get("RDMA_MIG_LAB_ACCEL", "auto")
        if options.accel not in ("auto", "kvm", "tcg"):
            parser.error("RDMA_MIG_LAB_ACCEL must be auto, kvm or tcg")
    options.share = [share.resolve() for share in options.share]
    for share in options.share:
        if not share.is_dir():
            parser.error(f"--share {share}: no such directory")
    return options


def _writer(descriptor: int) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    return write


@contextlib.contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"lab: {text}", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace, console: Path, work: Path) -> int:
    began = time.monotonic()
    deadline = began + options.timeout
    host.check()
    debian = kernel.get()
    end = secrets.token_hex(16)
    terminal = os.get_terminal_size(0) if options.shell else None
    command = options.command or ["bash", "-i"]
    files = guest_files(command, options.share, debian.modules, end, terminal)
    image = work / "initramfs"
    image.write_bytes(initramfs.build(debian, files))
    chosen = accel.choose(options.accel, debian, image)
    settings = Settings(
        accel=chosen,
        memory=options.memory,
        cpus=options.cpus,
        image=debian.image,
        initramfs=image,
        console=console,
        shares=options.share,
    )
    out, err = Output(end, _writer(1)), Output(end, _writer(2))
    if os.path.sameopenfile(1, 2):
        err = Output(end, _writer(1))
    outputs = {"out": out.feed, "err": err.feed}
    if options.shell:
        outputs["terminal"] = _writer(1)
    with Machine(settings, outputs) as machine:
        machine.boot("ready", deadline)
        how = "KVM" if chosen == "kvm" else "software emulation"
        ready = f"ready after {time.monotonic() - began:.1f} s"
        hint = "; Ctrl-] ends it" if options.shell else ""
        size = f"{options.cpus} CPUs, {options.memory}"
        _tell(f"Linux {debian.version}, {how}, {size}, {ready}{hint}")
        with _raw_terminal(options.shell):
            if options.shell:
                machine.add_input(0, lambda data: _typed(machine, data))
            else:
                machine.wait_for(out, err)
            return machine.finish(deadline)


def _typed(machine: Machine, data: bytes) -> None:
    if ESCAPE in data:
        raise Stopped(signal.SIGTERM)
    machine.send("terminal", data)


def _keep(console: Path, why: str) -> None:
    """Keep the console log of a run that failed, and no more than the last few of them."""
    said = Path(f"{console}.qemu")
    if said.exists() and said.stat().st_size:
        with console.open("ab") as log:
            log.write(b"\nqemu-system-x86_64 said:\n" + said.read_bytes())
    if console.exists():
        _tell(f"{why}; console log: {console}")
    logs = sorted(CACHE.glob("console-*.log"), key=lambda path: path.stat().st_mtime)
    for old in logs[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)


def _tail(console: Path, lines: int = 30) -> str:
    try:
        text = console.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"  | {line.rstrip()}" for line in text.splitlines()[-lines:])


def _on_signal(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    CACHE.mkdir(exist_ok=True)
    console = CACHE / f"console-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    why = None
    try:
        with tempfile.TemporaryDirectory(prefix="run-", dir=CACHE) as work:
            status = _run(options, console, Path(work))
        if status:
            why = f"the command ended with status {status}"
        elif console.exists() and KERNEL_COMPLAINT.search(console.read_bytes()):
            why = "the command ended well, but the kernel complained"
    except LabError as error:
        status, why = NOT_STARTED, "the lab failed"
        _tell(f"failed: {error}")
        if tail := _tail(console):
            print(tail, file=sys.stderr)
    except TimedOut as error:
        status, why = TIMED_OUT, f"timed out after {options.timeout:g} s, {error}"
    except Stopped as stop:
        status = 128 + stop.number
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    if options.log is not None and console.exists():
        shutil.copyfile(console, options.log)
    if why is not None:
        _keep(console, why)
    else:
        console.unlink(missing_ok=True)
    Path(f"{console}.qemu").unlink(missing_ok=True)
    return status
