# SPDX-License-Identifier: Apache-2.0
"""One real QEMU process, driven over QMP; every wait has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from qemu.qmp import QMPClient, QMPError

from harness.files import Buffer, FileBytes, JoinedBytes
from harness.guest import Guest, heartbeats_in

_T = TypeVar("_T")

#: Migration states that do not change by themselves any more.
FINAL_STATES = ("completed", "failed", "cancelled")

_POLL = 0.02  # seconds between two looks at something that has no event to wait for
_STDERR_SHOWN = 4000  # bytes of the end of QEMU's stderr in a failure


class HarnessError(Exception):
    """QEMU did not do what was asked, or not in time. The message ends with its stderr."""


class RamBlockInfo(NamedTuple):
    """A RAM block as QEMU's own ``info ramblock`` shows it."""

    name: str
    offset: int
    """Start in QEMU's RAM address space (not guest-physical), bytes."""
    used: int
    """Bytes in use: what a migration moves."""
    total: int
    """Bytes allocated."""


class Qemu:
    """A QEMU with the boot-sector guest, RAM in a file in /dev/shm, no network, no display.

    Use as a context manager: leaving it kills the process and removes its files.

    Args:
        machine: QEMU machine type: ``pc``, ``q35`` or a versioned name.
        guest: what the guest does; the image and the parameters must be the same at both ends.
        memory_mib: guest RAM, MiB, in one RAM block.
        memory: instead of that, the blocks of guest RAM: names and sizes, bytes, in the order of
            their guest-physical addresses. Several are NUMA nodes with a back end each. QEMU wants
            multiples of 4096 that add up to one of 8192.
        paused: start with ``-S``; a migration's destination then stays stopped when it is done.
        incoming: value of ``-incoming``: ``defer`` or a URI. When the constructor is through, QEMU
            listens on it.
        extra: arguments at the end of the command line, behind all other devices.
        accel: QEMU accelerator.
        prefix: a command that QEMU is started through, such as ``setpriv --bounding-set=...``. It
            must replace itself by QEMU (exec), which is killed by process id.
        owner: user and group id that QEMU and its files get; None for our own.
        name: how failures call this one: ``source``, ``destination``.
        timeout: deadline of every wait that is not given one of its own, seconds.
    """

    def __init__(
        self,
        *,
        machine: str = "pc",
        guest: Guest | None = None,
        memory_mib: int = 64,
        memory: Mapping[str, int] | None = None,
        paused: bool = False,
        incoming: str | None = None,
        extra: Sequence[str] = (),
        accel: str = "tcg",
        prefix: Sequence[str] = (),
        owner: tuple[int, int] | None = None,
        name: str = "QEMU",
        timeout: float = 60.0,
    ) -> None:
        self.machine = machine
        self.guest = guest or Guest.idle()
        #: The blocks of guest RAM and their sizes, bytes.
        self.memory_sizes = dict(memory or {"pc.ram": memory_mib << 20})
        self.memory_size = sum(self.memory_sizes.values())
        self.guest.check_fits(self.memory_size)
        self.name = name
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: _Monitor | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="rdma-mig-qemu-", dir="/dev/shm"))
        #: The files that the blocks of guest RAM are in.
        self.memory_files = {name: self._directory / name for name in self.memory_sizes}
        self.serial_path = self._directory / "serial"
        self.stderr_path = self._directory / "stderr"
        try:
            self._write_files(owner)
            self._start(self._arguments(paused, incoming, accel, extra), prefix, owner)
        except BaseException:
            self.close()
            raise

    def _write_files(self, owner: tuple[int, int] | None) -> None:
        image = self._directory / "boot.img"
        image.write_bytes(self.guest.image())
        self.serial_path.touch()
        self.stderr_path.touch()
        for name, path in self.memory_files.items():
            with path.open("wb") as memory:
                memory.truncate(self.memory_sizes[name])
        if owner:
            for path in (self._directory, image, self.serial_path, *self.memory_files.values()):
                os.chown(path, *owner)

    def _arguments(
        self, paused: bool, incoming: str | None, accel: str, extra: Sequence[str]
    ) -> list[str]:
        arguments = [
            qemu_binary(), "-nodefaults", "-no-user-config", "-display", "none", "-accel", accel,
            *self._memory_arguments(),
            # A floppy, because it starts on pc and on q35 alike, and a read-only one needs no lock
            # that the other end holds.
            "-drive", f"file={self._directory}/boot.img,format=raw,if=floppy,readonly=on",
            "-chardev", f"file,id=serial,path={self.serial_path}", "-serial", "chardev:serial",
        ]  # fmt: skip
        if paused:
            arguments.append("-S")
        if incoming is not None:
            arguments += ["-incoming", incoming]
        return [*arguments, *extra]

    def _memory_arguments(self) -> list[str]:
        names = list(self.memory_sizes)
        one = f",memory-backend={names[0]}" if len(names) == 1 else ""
        arguments = ["-machine", self.machine + one, "-m", f"{self.memory_size}B"]
        for name, size in self.memory_sizes.items():
            # The x- option keeps a block's plain name: pc.ram is that of a machine without a file
            # behind its RAM too, so what we write can be restored into that one as well.
            arguments += [
                "-object", f"memory-backend-file,id={name},size={size},share=on,"
                f"mem-path={self.memory_files[name]},x-use-canonical-path-for-ramblock-id=off",
            ]  # fmt: skip
            if not one:
                arguments += ["-numa", f"node,memdev={name}"]
        return arguments

    def _start(
        self, arguments: list[str], prefix: Sequence[str], owner: tuple[int, int] | None
    ) -> None:
        #: The command line, without the options that only connect the harness.
        self.command = [*prefix, *arguments]
        # Dies with us, should nobody be left to close it.
        setpriv = [shutil.which("setpriv") or "/usr/bin/setpriv", "--pdeathsig", "KILL"]
        if owner:
            setpriv += [f"--reuid={owner[0]}", f"--regid={owner[1]}", "--clear-groups"]
        ours, theirs = socket.socketpair()
        try:
            monitor = ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}",
                       "-mon", "chardev=qmp,mode=control"]  # fmt: skip
            with self.stderr_path.open("wb") as stderr:
                self._process = subprocess.Popen(
                    [*setpriv, "--", *prefix, *arguments, *monitor],
                    stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                    pass_fds=[theirs.fileno()],
                )  # fmt: skip
            theirs.close()
            self._monitor = _Monitor(ours)
            self._talk("its QMP greeting", self._monitor.connect(), self.timeout)
            self.status()  # answered only when start-up is through, -incoming included
        finally:
            theirs.close()
            if self._monitor is None:
                ours.close()

    # Life

    def __enter__(self) -> Self:
        """Return itself, started."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill the process; a failure that passes through gets a note of what it last said."""
        if exc is not None and self._epitaph() not in str(exc):
            exc.add_note(self._epitaph())
        self.close()

    def __del__(self) -> None:
        """Warn about a process that nobody closed."""
        if getattr(self, "_process", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        pid = self._process.pid if self._process else None
        return f"<Qemu {self.name} {self.machine} pid {pid}>"

    def close(self) -> None:
        """Kill the process if it still runs, and remove its files. May be called again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        return self._running().pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to QEMU: SIGSTOP and SIGCONT to make it silent, SIGKILL to lose it."""
        self._running().send_signal(number)

    def wait_exit(self, deadline: float | None = None) -> int:
        """Wait until the process is gone and return its exit status, negative for a signal."""
        process = self._running()
        seconds = self.timeout if deadline is None else deadline
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self._error(f"still runs after {seconds:g} s") from None

    def stderr(self) -> str:
        """Everything that QEMU has printed so far."""
        return self.stderr_path.read_text(errors="replace")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise HarnessError(f"{self.name} was closed")
        return self._process

    def _epitaph(self) -> str:
        try:
            printed = self.stderr()[-_STDERR_SHOWN:].strip()
        except OSError:
            printed = ""
        status = self._process.poll() if self._process else None
        lines = [
            f"{self.name}: " + ("runs" if status is None else f"ended with status {status}"),
            f"  started as: {shlex.join(getattr(self, 'command', []))}",
        ]
        lines += [f"  it printed: {line}" for line in printed.splitlines()]
        return "\n".join(lines)

    def _error(self, what: str) -> HarnessError:
        return HarnessError(f"{self.name} {what}\n{self._epitaph()}")

    # QMP

    def _talk(self, what: str, question: Awaitable[_T], deadline: float | None) -> _T:
        if self._monitor is None:
            raise HarnessError(f"{self.name} was closed")
        seconds = self.timeout if deadline is None else deadline
        try:
            return self._monitor.run(question, seconds)
        except TimeoutError:
            raise self._error(f"did not answer within {seconds:g} s: {what}") from None
        except (QMPError, EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running().wait(0.2)  # a monitor that closed is an exit whose status tells
            raise self._error(f"failed: {what}: {error or type(error).__name__}") from None

    def qmp(self, command: str, deadline: float | None = None, **arguments: object) -> Any:
        """Execute a QMP command and return its result.

        Underscores in the names of arguments become hyphens.

        Raises:
            HarnessError: when QEMU refuses it, is gone, or does not answer within ``deadline`` s.
        """
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        if self._monitor is None:
            raise HarnessError(f"{self.name} was closed")
        return self._talk(command, self._monitor.client.execute(command, named), deadline)

    def give(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of a descriptor, under a name for ``fd:NAME``."""
        if self._monitor is None:
            raise HarnessError(f"{self.name} was closed")
        self._monitor.client.send_fd_scm(fd)
        self.qmp("getfd", fdname=name)

    def hmp(self, line: str) -> str:
        """Execute a command of the human monitor and return what it prints."""
        return str(self.qmp("human-monitor-command", command_line=line))

    def status(self) -> str:
        """The run state: ``running``, ``paused``, ``postmigrate``, ``inmigrate``, ..."""
        return str(self.qmp("query-status")["status"])

    def cont(self) -> None:
        """Let the guest run."""
        self.qmp("cont")

    def stop(self) -> None:
        """Stop the guest."""
        self.qmp("stop")

    def set_capability(self, name: str, on: bool = True) -> None:
        """Switch a migration capability, such as ``rdma-pin-all``."""
        self.qmp("migrate-set-capabilities", capabilities=[{"capability": name, "state": on}])

    def set_parameter(self, name: str, value: object) -> None:
        """Set a migration parameter: ``max-bandwidth`` (bytes/s), ``downtime-limit`` (ms), ..."""
        self.qmp("migrate-set-parameters", None, **{name: value})

    def migrate(self, uri: str, deadline: float | None = None) -> None:
        """Start a migration to ``uri``; over RDMA this returns when the connection stands."""
        self.qmp("migrate", deadline, uri=uri)

    def migrate_incoming(self, uri: str) -> None:
        """Listen on ``uri``, of a QEMU started with ``incoming="defer"``."""
        self.qmp("migrate-incoming", uri=uri)

    def query_migrate(self) -> dict[str, Any]:
        """What QEMU knows of its migration: ``status``, ``ram``, ``total-time``, ..."""
        return dict(self.qmp("query-migrate"))

    def wait_event(
        self, name: str, deadline: float | None = None, **data: object
    ) -> dict[str, Any]:
        """Wait for a QMP event with this data, without asking QEMU for anything meanwhile.

        Events that come before it are used up. Those of migrations need the capability ``events``.
        """
        monitor = self._monitor
        if monitor is None:
            raise HarnessError(f"{self.name} was closed")

        async def awaited() -> dict[str, Any]:
            while True:
                event = dict(await monitor.client.events.get())
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return event

        return self._talk(f"event {name} {data}", awaited(), deadline)

    def wait(self, what: str, true: Callable[[], _T], deadline: float | None = None) -> _T:
        """Wait until ``true()`` returns something true, and return that.

        Raises:
            HarnessError: after ``deadline`` seconds, or as soon as QEMU is gone.
        """
        seconds = self.timeout if deadline is None else deadline
        end = time.monotonic() + seconds
        while not (result := true()):
            if self._running().poll() is not None:
                raise self._error(f"is gone; awaited was {what}")
            if time.monotonic() > end:
                raise self._error(f"was awaited in vain for {seconds:g} s: {what}")
            time.sleep(_POLL)
        return result

    def wait_status(self, *states: str, deadline: float | None = None) -> str:
        """Wait until the run state is one of ``states``, and return it."""
        last = ""

        def reached() -> str:
            nonlocal last
            last = self.status()
            return last if last in states else ""

        try:
            return self.wait(f"run state {' or '.join(states)}", reached, deadline)
        except HarnessError as error:
            error.add_note(f"the last run state seen was {last!r}")
            raise

    def wait_migration(
        self, deadline: float | None = None, *, expect: str = "completed"
    ) -> dict[str, Any]:
        """Wait until the migration is over, and return the answer to ``query-migrate``.

        Raises:
            HarnessError: when it ends in another state than ``expect``, or not in time.
        """
        result: dict[str, Any] = {}

        def over() -> bool:
            nonlocal result
            result = self.query_migrate()
            return result.get("status") in FINAL_STATES

        try:
            self.wait("the end of the migration", over, deadline)
        except HarnessError as error:
            error.add_note(f"query-migrate said last: {result}")
            raise
        if result["status"] != expect:
            raise self._error(f"has a migration {result['status']}, not {expect}: {result}")
        return result

    # What the guest shows

    def serial(self) -> bytes:
        """Everything that the guest has printed in this QEMU."""
        return self.serial_path.read_bytes()

    def heartbeats(self) -> list[int]:
        """The numbers that the guest has printed in this QEMU, whole lines only.

        A guest that was migrated within a line has printed its beginning at the source; that piece
        is passed over here. Join both ends' ``serial()`` to check it too.
        """
        serial = self.serial()
        if not serial.startswith(b"H "):
            serial = serial.partition(b"\n")[2]
        return heartbeats_in(serial)

    def heartbeat(self) -> int | None:
        """The last number that the guest has printed, None when it has not printed any."""
        numbers = self.heartbeats()
        return numbers[-1] if numbers else None

    def wait_heartbeat(self, more: int = 1, deadline: float | None = None) -> int:
        """Wait until ``more`` heartbeats more have been printed, and return the last one."""
        due = len(self.heartbeats()) + more
        self.wait(f"{more} more heartbeats", lambda: len(self.heartbeats()) >= due, deadline)
        return self.heartbeats()[-1]

    # What is in its memory

    @property
    def memory_path(self) -> Path:
        """The file that guest RAM is in, where that is one file."""
        (path,) = self.memory_files.values()
        return path

    def memory(self) -> Buffer:
        """Guest RAM from guest-physical address 0 on, live: still only while the guest is."""
        files = [FileBytes(path) for path in self.memory_files.values()]
        return files[0] if len(files) == 1 else JoinedBytes(files)

    def pmemsave(self, address: int, size: int) -> bytes:
        """Read guest-physical memory as the guest's processor would see it."""
        # QEMU writes the file, as whoever it runs as, so it has to lie where that one may.
        path = self._directory / "pmemsave"
        try:
            self.qmp("pmemsave", val=address, size=size, filename=str(path))
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)

    def ram_blocks(self) -> list[RamBlockInfo]:
        """The RAM blocks, in QEMU's own order."""
        row = re.compile(r"^\s*(\S.*?)\s+\d+ [KMG]iB((?:\s+0x[0-9a-f]+)+)", re.MULTILINE)
        blocks = []
        for match in row.finditer(self.hmp("info ramblock")):
            offset, used, total = (int(number, 16) for number in match[2].split()[:3])
            blocks.append(RamBlockInfo(match[1], offset, used, total))
        if not blocks:
            raise self._error("has no RAM block that 'info ramblock' shows")
        return blocks


class _Monitor:
    """The asyncio client of qemu.qmp, run by whoever waits for an answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._loop = asyncio.new_event_loop()
        self._socket = connection
        self.client = QMPClient()

    async def connect(self) -> None:
        await self.client.connect(self._socket)

    def run(self, question: Awaitable[_T], seconds: float) -> _T:
        return self._loop.run_until_complete(asyncio.wait_for(question, seconds))

    def close(self) -> None:
        # The connection is gone by now, and the library reports that again here.
        with contextlib.suppress(Exception):
            self.run(self.client.disconnect(), 5.0)
        self._socket.close()
        self._loop.close()


def qemu_binary() -> str:
    """The QEMU to test with: the one that RDMA_MIG_QEMU names, or the one on the path."""
    return os.environ.get("RDMA_MIG_QEMU", "qemu-system-x86_64")


def free_port() -> int:
    """A port number that nothing listened on a moment ago (TCP, which RDMA's numbers resemble)."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
