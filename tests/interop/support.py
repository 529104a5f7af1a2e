# SPDX-License-Identifier: Apache-2.0
"""What the interop tests share: rdma-migrate as a process, its output, and what may be left."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import pytest
from harness import PAGE_SIZE, Qemu, device_address, heartbeats_in
from harness.files import Buffer
from harness.output import check_output

_T = TypeVar("_T")

MIB = 1 << 20
#: The command of the environment that runs the tests.
RDMA_MIGRATE = Path(sys.executable).with_name("rdma-migrate")
#: What either end may use beside the guest's RAM, bytes.
OVERHEAD = 96 * MIB

_POLL = 0.02
_SHOWN = 6000


class Size(NamedTuple):
    """How large a guest is, MiB."""

    memory: int
    dirty: int


SMALL = Size(64, 8)
FULL = Size(256, 64)


def sizes() -> list[Any]:
    """The sizes to test with, as parameters: small ones for everybody, large ones as ``full``.

    RDMA_MIG_TEST_SIZE=full makes the small ones large too: for a host whose device is fast.
    """
    named = {"small": SMALL, "full": FULL}
    wanted = os.environ.get("RDMA_MIG_TEST_SIZE", "small")
    if wanted not in named:
        raise ValueError(f"RDMA_MIG_TEST_SIZE is {wanted!r}; allowed are {', '.join(named)}")
    if wanted == "full":
        return [pytest.param(FULL, id="full")]
    return [
        pytest.param(SMALL, id="small"),
        pytest.param(FULL, id="full", marks=pytest.mark.full),
    ]


@cache
def slowness() -> float:
    """How much longer than on a usual machine things take here; 1 on that one, never less.

    Measured once, by what every command begins with: Python's start and the imports.
    """
    begun = time.monotonic()
    subprocess.run([RDMA_MIGRATE, "--version"], check=True, capture_output=True, timeout=120)
    return max(1.0, (time.monotonic() - begun) / 0.5)


def patience(seconds: float) -> float:
    """A limit that is no requirement, only a backstop, for a machine as slow as this one."""
    return seconds * max(1.0, min(slowness() / 4, 10.0))


def prompt() -> float:
    """Within how many seconds a signal has to end it; two, on a usual machine."""
    return 2 * slowness()


def rdma_uri(port: int) -> str:
    """Where to listen on the device under test."""
    return f"rdma:{device_address()[1]}:{port}"


def wait_for(what: str, true: Callable[[], _T], seconds: float) -> _T:
    """Wait until ``true()`` returns something true, and return that."""
    end = time.monotonic() + seconds
    while not (result := true()):
        if time.monotonic() > end:
            raise AssertionError(f"awaited in vain for {seconds:g} s: {what}")
        time.sleep(_POLL)
    return result


_EVENTS = {"incoming", "outgoing", "convert", "checkpoint", "restore", "migrate"}


class Command:
    """An ``rdma-migrate`` at work; a context manager that kills it, and says what it printed.

    Args:
        arguments: of rdma-migrate, the sub-command first.
        prefix: a command that it is started through, and that replaces itself by it (exec).
        timeout: limit of every wait that is not given one of its own, seconds.
    """

    def __init__(
        self,
        *arguments: str | Path,
        prefix: Sequence[str | Path] = (),
        pass_fds: Sequence[int] = (),
        timeout: float | None = None,
    ) -> None:
        self.command = [*map(str, prefix), str(RDMA_MIGRATE), *map(str, arguments)]
        self.name = f"rdma-migrate {arguments[0]}"
        self.timeout = patience(90) if timeout is None else timeout
        self._rusage: Any = None
        # Files, since a pipe that nobody reads would stop it.
        with (
            tempfile.NamedTemporaryFile(prefix="rdma-mig-out-", delete=False) as out,
            tempfile.NamedTemporaryFile(prefix="rdma-mig-err-", delete=False) as err,
        ):
            self._out, self._err = Path(out.name), Path(err.name)
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, pass_fds=pass_fds
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(self.epitaph())
        self.process.kill()
        self.process.wait()
        self._out.unlink(missing_ok=True)
        self._err.unlink(missing_ok=True)

    # ---- what it says ----

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        """What it has said on standard error so far."""
        return self._err.read_text()

    def epitaph(self) -> str:
        """What it printed, and whether it runs: the evidence of a failure."""
        status = self.process.poll()
        state = "runs" if status is None else f"ended with status {status}"
        lines = [f"{self.name}: {state}", f"  started as: {shlex.join(self.command)}"]
        lines += [f"  stderr: {line}" for line in self.stderr[-_SHOWN:].splitlines()]
        lines += [f"  stdout: {line}" for line in self.stdout[-_SHOWN:].splitlines()]
        return "\n".join(lines)

    def events(self) -> list[dict[str, Any]]:
        """The events of ``--json``, whole lines only; each is as the schema has it."""
        told = [json.loads(line) for line in self.stdout.split("\n")[:-1]]
        if _EVENTS & set(self.command):
            for event in told:
                check_output("event", event)
        return told

    def event(self, name: str) -> dict[str, Any]:
        """The one event of that name."""
        found = [event for event in self.events() if event["event"] == name]
        assert len(found) == 1, f"{len(found)} events {name!r}\n{self.epitaph()}"
        return found[0]

    def wait_event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event; a field that is a number is the least that it has to reach."""

        def matches(event: dict[str, Any]) -> bool:
            return event["event"] == name and all(
                event[key] >= value if isinstance(value, int) else event[key] == value
                for key, value in fields.items()
            )

        def seen() -> dict[str, Any] | None:
            gone = self.process.poll() is not None
            found = next((event for event in self.events() if matches(event)), None)
            assert found or not gone, f"ended without event {name} {fields}\n{self.epitaph()}"
            return found

        try:
            return wait_for(f"event {name} {fields} of {self.name}", seen, self.timeout)
        except AssertionError as error:
            if "awaited in vain" in str(error):
                error.add_note(self.epitaph())
            raise

    # ---- its end ----

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float | None = None) -> int:
        """Wait for its end and return its exit status, negative for a signal."""
        limit = self.timeout if seconds is None else seconds
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {limit:.1f} s\n{self.epitaph()}") from None

    def succeed(self) -> Self:
        """Wait for its end, which must be exit status 0."""
        assert self.wait() == 0, self.epitaph()
        assert "Traceback" not in self.stderr, self.epitaph()
        return self

    def fail(self, status: int, seconds: float | None = None) -> str:
        """Wait for its end with this status, and return the one line that it says why in."""
        assert self.wait(seconds) == status, self.epitaph()
        lines = [line for line in self.stderr.splitlines() if line.startswith("rdma-migrate: ")]
        lines = [line for line in lines if not line.startswith("rdma-migrate: warning: ")]
        assert len(lines) == 1, f"not one line that says why\n{self.epitaph()}"
        assert "Traceback" not in self.stderr, self.epitaph()
        return lines[0].removeprefix("rdma-migrate: ")


class Incoming(Command):
    """``rdma-migrate incoming``, ready or not.

    Args:
        output: snapshot directory.
        options: more options; ``--json`` is among them unless ``text`` is set.
        text: print for people.
        uri: where to listen; a free port of the device by default.
    """

    def __init__(
        self,
        output: Path,
        *options: str,
        text: bool = False,
        uri: str | None = None,
        prefix: Sequence[str | Path] = (),
        timeout: float | None = None,
    ) -> None:
        self.output = output
        self._uri = ""
        self._ready, write_end = os.pipe()
        try:
            super().__init__(
                "incoming", uri or rdma_uri(0), "--output", output,
                "--ready-fd", str(write_end), *([] if text else ["--json"]), *options,
                prefix=prefix, pass_fds=[write_end], timeout=timeout,
            )  # fmt: skip
        except BaseException:
            os.close(self._ready)
            raise
        finally:
            os.close(write_end)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        os.close(self._ready)

    @property
    def uri(self) -> str:
        """Where it can be connected to; waits until it can."""
        if not self._uri:
            received = b""
            end = time.monotonic() + self.timeout
            while not received.endswith(b"\n"):
                left = max(end - time.monotonic(), 0)
                ready = select.select([self._ready], [], [], left)[0]
                assert ready, f"was not ready in time\n{self.epitaph()}"
                piece = os.read(self._ready, 4096)
                if not piece:
                    self.wait(5)
                    raise AssertionError(f"ended before it was ready\n{self.epitaph()}")
                received += piece
            self._uri = received.decode().rstrip("\n")
        return self._uri


def outgoing(
    directory: Path,
    uri: str,
    *options: str,
    pin_all: bool = True,
    text: bool = False,
    timeout: float | None = None,
) -> Command:
    """``rdma-migrate outgoing``, started; with ``--rdma-pin-all`` unless told otherwise."""
    if pin_all:
        options = ("--rdma-pin-all", *options)
    if not text:
        options = ("--json", *options)
    return Command("outgoing", directory, uri, *options, timeout=timeout)


# Migrations

#: For a migration that is to be met in the middle, bytes a second: 64 MiB take 8 s.
SLOW = 8 * MIB


class Snapshot(NamedTuple):
    """A snapshot that tests start from, and what it is of."""

    directory: Path
    completed: dict[str, Any]
    """The last event of the run that made it."""
    machine: dict[str, Any]
    """How a QEMU of the same machine is made."""
    last_devices: list[str]
    """Values of ``-device`` beside that, for the devices whose state comes last in the stream."""


def destination(
    snapshot: Snapshot, uri: str | None, *, devices: Sequence[str] | None = None, **changed: object
) -> Qemu:
    """A QEMU that waits for the snapshot, and would let its guest run at once.

    Args:
        snapshot: what it waits for.
        uri: where; None for a QEMU that does not wait.
        devices: the last of them, where they are not those of the snapshot.
        changed: what else is different.
    """
    devices = snapshot.last_devices if devices is None else devices
    extra = [word for device in devices for word in ("-device", device)]
    return Qemu(**snapshot.machine | changed, extra=extra, incoming=uri, name="destination")


def same_snapshot(first: Path, second: Path) -> str:
    """How two snapshots differ, but for where they were restored; an empty text if they do not."""
    command = ["diff", "-r", "--exclude=restored", str(first), str(second)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def slow_migration(source: Qemu, incoming: Incoming) -> None:
    """Begin a migration into ``incoming``, and return in the middle of it."""
    source.set_parameter("max-bandwidth", SLOW)
    source.migrate(incoming.uri)
    incoming.wait_event("progress", phase="round", done=3)
    assert source.query_migrate()["status"] == "active"


def assert_survives(source: Qemu, expect: str = "failed") -> None:
    """The source's migration ends like this, and its guest goes on as if nothing had been."""
    source.wait_migration(expect=expect)
    assert source.wait_status("running") == "running"
    source.wait_heartbeat(2)
    printed = heartbeats_in(source.serial())
    assert printed == list(range(1, len(printed) + 1))


# What it prints

_TEXT = str
_COUNT = int
_SECONDS = float
_KEYS: dict[str, dict[str, type]] = {
    "listening": {"uri": _TEXT},
    "connected": {
        "peer": _TEXT, "device": _TEXT, "pin_all": bool, "connections": _COUNT,
        "local": _TEXT, "port": _COUNT, "transport": _TEXT,
        "gid_index": _COUNT, "gid": _TEXT, "mtu": _COUNT,
    },
    "progress": {"phase": _TEXT, "done": _COUNT, "total": _COUNT},
    "warning": {"message": _TEXT},
    "failed": {
        "message": _TEXT, "step": _TEXT, "owner": _TEXT, "remedy": _TEXT, "exit_status": _COUNT,
    },
    "completed": {
        "bytes": _COUNT, "pages": _COUNT, "nonzero_bytes": _COUNT, "device_state_bytes": _COUNT,
        "rounds": _COUNT, "writes": _COUNT, "normal_pages": _COUNT, "duplicate_pages": _COUNT,
        "setup_seconds": _SECONDS,
        "transfer_seconds": _SECONDS, "writing_seconds": _SECONDS, "bytes_per_second": _SECONDS,
        "path": _TEXT, "peer": _TEXT, "confirmed": _TEXT,
    },
}  # fmt: skip


def check_events(command: Command, took: float, *, pin_all: bool = True) -> dict[str, Any]:
    """Check the whole ``--json`` output of a command that succeeded; return its last event.

    Args:
        command: what has ended.
        took: seconds since it was started.
        pin_all: what it has to say about the registration of RAM.
    """
    events = command.events()
    for event in events:
        fields = {key: value for key, value in event.items() if key != "event"}
        expected = _KEYS[event["event"]]
        assert fields.keys() == expected.keys(), event
        for key, kind in expected.items():
            assert type(fields[key]) is kind, (key, event)
    names = [event["event"] for event in events]
    coarse = "".join(
        {"listening": "l", "connected": "c", "progress": "p", "completed": "C"}.get(name, "?")
        for name in names
    )
    # A source reads its snapshot before it connects.
    order = r"lcp+C" if isinstance(command, Incoming) else r"p*cp+C"
    assert re.fullmatch(order, coarse), names
    for event in events:
        if event["event"] == "progress":
            assert 0 <= event["done"] <= (event["total"] or event["done"]), event
    done = dict(events[-1])
    device, address = device_address()
    assert command.event("connected")["device"] == device
    assert command.event("connected")["pin_all"] is pin_all
    assert done["peer"].startswith(f"{address}:")
    assert done["bytes"] == done["pages"] * PAGE_SIZE
    assert 0 < done["nonzero_bytes"] <= done["bytes"]
    assert done["rounds"] >= 1
    assert 0 < done["setup_seconds"] < took
    assert 0 < done["transfer_seconds"] < took
    assert 0 < done["writing_seconds"] < took
    rate = done["bytes"] / done["transfer_seconds"]
    assert abs(done["bytes_per_second"] - rate) <= 0.001 * rate + 1
    return done


def data_bytes(blocks: dict[str, Buffer]) -> int:
    """Bytes of all blocks in pages that are not zero."""
    step = 64 * PAGE_SIZE
    zeros = bytes(step)
    count = 0
    for data in blocks.values():
        for offset in range(0, len(data), step):
            piece = bytes(data[offset : offset + step])
            if piece == zeros:
                continue
            pages = (piece[at : at + PAGE_SIZE] for at in range(0, len(piece), PAGE_SIZE))
            count += sum(len(page) for page in pages if page != zeros[: len(page)])
    return count


def disk_bytes(path: Path) -> int:
    """Bytes that a file, or everything below a directory, takes on disk."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(entry.stat().st_blocks * 512 for entry in paths)


class PeakMemory:
    """Watches how much memory a process uses, until it ends or the block is left.

    Attributes:
        resident: the most that was resident at one time (VmHWM), shared memory included, bytes.
        shared: the most that its memory files held at one time, mapped or not, bytes.
    """

    def __init__(self, pid: int) -> None:
        self.resident = 0
        self.shared = 0
        self._proc = Path(f"/proc/{pid}")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            try:
                self._look()
            except (OSError, ValueError):
                continue  # it came to its end, or a descriptor did

    def _look(self) -> None:
        status = (self._proc / "status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found:
            self.resident = max(self.resident, int(found[1]) * 1024)
        files = {}
        for link in (self._proc / "fd").iterdir():
            if os.readlink(link).startswith("/memfd:"):
                file = link.stat()
                files[file.st_dev, file.st_ino] = file.st_blocks * 512
        self.shared = max(self.shared, sum(files.values()))


# What may be left

#: QEMUs that several tests share: they outlive a test.
SHARED: list[Qemu] = []


class Traces(NamedTuple):
    """What tests could leave behind on this host."""

    processes: frozenset[str]
    shared_memory: frozenset[str]
    verbs: frozenset[str]

    def beyond(self, before: Traces) -> list[str]:
        """What is there now and was not before."""
        return sorted(
            f"{kind}: {trace}"
            for kind, ours, theirs in zip(self._fields, self, before, strict=True)
            for trace in ours - theirs
        )


def traces() -> Traces:
    """Our processes, their files in /dev/shm, and verbs objects that belong to such processes."""
    pids = {qemu.pid for qemu in SHARED}
    directories = {qemu.memory_path.parent.name for qemu in SHARED}
    return Traces(
        frozenset(f"pid {pid} ({name})" for pid, name in _children() if pid not in pids),
        frozenset(
            entry.name
            for entry in Path("/dev/shm").iterdir()
            if entry.name.startswith("rdma-mig-") and entry.name not in directories
        ),
        frozenset(_verbs_objects()),
    )


def _children() -> list[tuple[int, str]]:
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        for word in path.read_text().split():
            try:
                found.append((int(word), Path(f"/proc/{word}/comm").read_text().strip()))
            except OSError:
                continue
    return found


# What `rdma resource show` counted when no process had any object: kernels have some of their own.
_NO_OBJECTS: set[bytes] = set()


def _verbs_objects() -> list[str]:
    counted = _rdma("show")
    if counted in _NO_OBJECTS:
        return []
    lines = []
    for kind in ("qp", "cq", "mr", "pd", "cm_id"):
        for entry in json.loads(_rdma("show", kind) or b"[]"):
            comm = str(entry.get("comm", ""))
            if "pid" in entry and re.match(r"rdma-mig|python|qemu|pytest", comm):
                lines.append(f"{kind} of {comm} pid {entry['pid']}: {json.dumps(entry)}")
    if not lines and _rdma("show") == counted:
        _NO_OBJECTS.add(counted)
    return lines


def _rdma(*arguments: str) -> bytes:
    return subprocess.run(
        ["rdma", "-j", "resource", *arguments], capture_output=True, timeout=60, check=True
    ).stdout
