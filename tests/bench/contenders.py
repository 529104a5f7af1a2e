# SPDX-License-Identifier: Apache-2.0
"""The contenders: a source and a destination, each a QEMU or rdma-migrate; one migration each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from harness import (
    Qemu,
    device_address,
    differences,
    fill_random,
    free_port,
    snapshot_blocks,
)
from harness.files import Buffer

MIB = 1 << 20
CONTENTS = ("idle", "random", "half")
MODES = ("pin-all", "dynamic")
#: Source and destination.
CONTENDERS = (("qemu", "qemu"), ("qemu", "ours"), ("ours", "qemu"), ("ours", "ours"))
REFERENCE = CONTENDERS[0]
#: Ours with --assume-zero-destination, beside the others where that makes a difference.
ASSUMING = ("ours-assuming", "qemu")

# QEMU's limit is on what it sends a second; this is none.
_MAX_BANDWIDTH = 10**11
_RAM = "pc.ram"
# Seconds from when a destination listens until it does nothing but wait, as one does in practice.
AT_REST = 1.0
_COMMAND = Path(__file__).with_name("command.py")
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Measured:
    """One migration; seconds and bytes. What a contender has not got is left out.

    Attributes:
        total: from the CM request to the last byte of the stream consumed.
        setup: populating and registering, and agreeing on the blocks: the source's.
        transfer: the rest of the total.
        load, write: of the snapshot.
        disk: from the last byte of the stream until the snapshot is on disk.
        wall: of the whole command, its start included; of a QEMU, that of the migration.
        user, system: CPU seconds of both ends, within the migration.
        whole: CPU seconds of both ends, with start, snapshot load and write.
        peak: the larger of the two ends' peaks of resident memory.
        pinned: the most that the destination had pinned when it told of something.
        writes: RDMA writes, where our end is the source.
    """

    total: float = 0.0
    setup: float = 0.0
    transfer: float = 0.0
    load: float | None = None
    write: float | None = None
    disk: float | None = None
    wall: float = 0.0
    user: float = 0.0
    system: float = 0.0
    whole: float = 0.0
    peak: int = 0
    pinned: int | None = None
    writes: int | None = None


class Ours:
    """An ``rdma-migrate`` with stamped events; a context manager that kills it.

    With ``script``, that of a user is run instead, whose events are not stamped.
    """

    def __init__(self, *arguments: str | Path, timeout: float, script: Path = _COMMAND) -> None:
        self._end = time.monotonic() + timeout
        self._what = f"rdma-migrate {arguments[0]}"
        self._rest = b""
        self.began = time.time()
        self.events: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments), "--json"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def event(self, name: str) -> dict[str, Any]:
        """Return an event, which is waited for if it has not come yet."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    return event
            self._read()

    def _read(self) -> None:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        if not select.select([fd], [], [], max(self._end - time.monotonic(), 0))[0]:
            raise RuntimeError(f"{self._what} did not end in time; its events: {self.events[-3:]}")
        piece = os.read(fd, 1 << 16)
        if not piece:
            status = self._process.wait()
            raise RuntimeError(f"{self._what} ended with {status}; its events: {self.events[-3:]}")
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self.events += [json.loads(line) for line in lines]

    def join(self) -> float:
        """Wait for success; return the seconds that the command took."""
        self.event("completed")
        if status := self._process.wait(max(self._end - time.monotonic(), 1)):
            raise RuntimeError(f"{self._what} ended with {status}")
        return time.time() - self.began

    def add_to(self, measured: Measured, first: str, last: str) -> None:
        """Add what was used between two events, and in all."""
        begin, end, over = (self.event(name) for name in (first, last, "completed"))
        measured.user += end["user"] - begin["user"]
        measured.system += end["system"] - begin["system"]
        measured.whole += over["user"] + over["system"]
        measured.peak = max(measured.peak, over["peak"])


class QemuUsage:
    """What a QEMU uses from here on."""

    def __init__(self, qemu: Qemu) -> None:
        self._proc = Path(f"/proc/{qemu.pid}")
        self._before = self._ticks()

    def _ticks(self) -> tuple[int, int]:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]), int(fields[12])

    def add_to(self, measured: Measured) -> None:
        user, system = (
            (now - before) / _TICK for now, before in zip(self._ticks(), self._before, strict=True)
        )
        measured.user += user
        measured.system += system
        measured.whole += user + system
        found = re.search(r"VmHWM:\s+(\d+) kB", (self._proc / "status").read_text())
        if found:
            measured.peak = max(measured.peak, int(found[1]) << 10)


def event_time(event: dict[str, Any]) -> float:
    """When a QMP event came."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def _soil(qemu: Qemu) -> None:
    """Fill the memory of a QEMU that waits, as one finds it whose file was used before."""
    with qemu.memory_path.open("r+b") as memory:
        for _ in range(0, qemu.memory_size, MIB):
            memory.write(b"\xff" * MIB)


@dataclass
class Stage:
    """A stopped QEMU with RAM of one size and content, and the snapshot of it.

    Args:
        ram: bytes.
        content: one of `CONTENTS`.
        directory: where snapshots go.
        timeout: of one migration, seconds.
    """

    ram: int
    content: str
    directory: Path
    timeout: float
    data: int = field(init=False)
    """Bytes of RAM that were filled."""

    @contextlib.contextmanager
    def set(self) -> Iterator[Self]:
        """Start the source, fill its RAM, and make the snapshot that ours sends."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.snapshot = self.directory / "source"
        with Qemu(
            memory_mib=self.ram // MIB, paused=True, name="source", timeout=self.timeout
        ) as self.source:
            self.data = self._fill(self.source.memory_path)
            self.source.set_capability("events")
            self.source.set_parameter("max-bandwidth", _MAX_BANDWIDTH)
            try:
                self._run_once("qemu", "ours", "dynamic", self.snapshot)
                self._compare("qemu", snapshot_blocks(self.snapshot)[_RAM])
                yield self
            finally:
                shutil.rmtree(self.directory, ignore_errors=True)

    def _fill(self, path: Path) -> int:
        """Fill RAM; `half` is every other MiB."""
        if self.content == "idle":
            return 0
        if self.content == "random":
            fill_random(path, 1, 0, self.ram)
            return self.ram
        for start in range(0, self.ram, 2 * MIB):
            fill_random(path, 1 + start, start, MIB)
        return self.ram // 2

    def copy_to_disk(self) -> float:
        """Return the seconds that dd takes to put as many bytes where snapshots go."""
        if not self.data:
            return 0.0
        target = self.directory / "copy"
        began = time.monotonic()
        subprocess.run(
            ["dd", f"if={self.source.memory_path}", f"of={target}", "bs=1M", "conv=fsync",
             f"count={self.data // MIB}", "status=none"],
            check=True, timeout=self.timeout,
        )  # fmt: skip
        seconds = time.monotonic() - began
        target.unlink()
        return seconds

    def _compare(self, source: str, arrived: Buffer) -> None:
        """Compare main memory: firmware that has run hides the blocks of ROMs."""
        ours = source != "qemu"
        sent = snapshot_blocks(self.snapshot)[_RAM] if ours else self.source.memory()
        if found := differences({_RAM: sent}, {_RAM: arrived}):
            raise RuntimeError(f"what arrived is not what was sent: {found}")

    def run(self, source: str, destination: str, mode: str, *, check: bool) -> Measured:
        """Migrate once.

        Args:
            source, destination: a pair of `CONTENDERS`, or `ASSUMING`.
            mode: one of `MODES`.
            check: compare every byte afterwards; the memory of a QEMU that shall be zero where
                nothing is sent is full of other bytes before.
        """
        target = self.directory / "arrived"
        try:
            return self._run_once(source, destination, mode, target, check=check)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _run_once(
        self, source: str, destination: str, mode: str, target: Path, *, check: bool = False
    ) -> Measured:
        measured = Measured()
        host = device_address()[1]
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            into: Ours | Qemu
            if destination == "ours":
                into = enter(
                    Ours("incoming", f"rdma:{host}:0", "--output", target, timeout=self.timeout)
                )
                uri = into.event("listening")["uri"]
                time.sleep(AT_REST)  # its second process still starts
            else:
                uri = f"rdma:{host}:{free_port()}"
                into = enter(
                    Qemu(
                        memory_mib=self.ram // MIB, paused=True, incoming=uri,
                        name="destination", timeout=self.timeout,
                    )
                )  # fmt: skip
                into.set_capability("events")
                if check and source != ASSUMING[0]:
                    _soil(into)
            theirs = QemuUsage(into) if isinstance(into, Qemu) else None
            if source != "qemu":
                flags = ["--rdma-pin-all"] if mode == "pin-all" else []
                if source == ASSUMING[0]:
                    flags.append("--assume-zero-destination")
                out = enter(Ours("outgoing", self.snapshot, uri, *flags, timeout=self.timeout))
                began, ended = self._from_ours(out, into, measured)
            else:
                began, ended = self._from_qemu(uri, into, mode, measured)
            if theirs is not None:
                theirs.add_to(measured)
            measured.total = ended - began
            measured.transfer = measured.total - measured.setup
            if check:
                self._compare(
                    source,
                    into.memory() if isinstance(into, Qemu) else snapshot_blocks(target)[_RAM],
                )
        return measured

    def _from_ours(self, out: Ours, into: Ours | Qemu, measured: Measured) -> tuple[float, float]:
        ended = self._arrived(into, measured)
        measured.wall = max(measured.wall, out.join())
        completed = out.event("completed")
        measured.setup = completed["setup_seconds"]
        measured.load = completed["writing_seconds"]
        measured.writes = completed["writes"]
        out.add_to(measured, "connecting", "completed")
        return out.event("connecting")["at"], ended

    def _from_qemu(
        self, uri: str, into: Ours | Qemu, mode: str, measured: Measured
    ) -> tuple[float, float]:
        source = self.source
        if source.status() == "postmigrate":
            # It migrates again only when it has run in between, if for a moment.
            source.cont()
            source.stop()
        source.set_capability("rdma-pin-all", mode == "pin-all")
        used = QemuUsage(source)
        began = time.time()
        source.migrate(uri)
        ended = self._arrived(into, measured)
        source.wait_event("MIGRATION", status="completed")
        used.add_to(measured)
        measured.wall = max(measured.wall, time.time() - began)
        measured.setup = source.query_migrate()["setup-time"] / 1000
        return began, ended

    def _arrived(self, into: Ours | Qemu, measured: Measured) -> float:
        """Wait for the destination's end; return when it had consumed the stream."""
        if isinstance(into, Qemu):
            return event_time(into.wait_event("MIGRATION", status="completed"))
        measured.wall = into.join()
        measured.write = into.event("completed")["writing_seconds"]
        into.add_to(measured, "connected", "streamed")
        measured.pinned = max(event["pinned"] for event in into.events)
        ended = float(into.event("streamed")["at"])
        measured.disk = into.event("completed")["at"] - ended
        return ended
