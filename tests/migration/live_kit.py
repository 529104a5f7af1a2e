# SPDX-License-Identifier: Apache-2.0
"""Live guests for the tests: memory that a thread writes, and a stream between two sockets."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import rdma_mig.migration as header
from rdma_mig.channel.link import SocketLink
from rdma_mig.channel.plain import PlainIncoming, PlainOutgoing
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import MigrationError, MigrationTimeout, RemoteProtocolError
from rdma_mig.memory import RamBlock
from rdma_mig.memory.dirty import ExplicitMarks
from rdma_mig.migration.guests import ProcessGuest
from rdma_mig.migration.live import LiveSource
from rdma_mig.migration.load import LiveDestination
from rdma_mig.migration.state import Migration
from rdma_mig.migration.status import MigrationCapability, MigrationState, MigrationStatus
from rdma_mig.waits import TransportLimits
from rdma_mig.wire.return_path import RETURN_PATH_PING

MIB = 1 << 20
PAGE = 4096
MACHINE = "live-1.0"
BLOCKS = (RamBlock("live.ram", 16 * MIB), RamBlock("live.more", 3 * MIB + 8192))


class Marks(ExplicitMarks):
    """Explicit marks that know whether somebody asks for them."""

    started = False

    def start(self) -> None:
        super().start()
        self.started = True

    def stop(self) -> None:
        super().stop()
        self.started = False


class WritingGuest(ProcessGuest):
    """A thread writes page after page of the first block, each with a number that grows.

    Args:
        blocks: its memory.
        pages: how many pages from the start are written, over and over.
        rate: pages a second; None for as fast as it can.
    """

    def __init__(
        self, blocks: Sequence[RamBlock], *, pages: int = 64, rate: float | None = 2000.0
    ) -> None:
        super().__init__(MACHINE, blocks)
        self.marks = Marks(self.ram)
        self.tracker = self.marks
        self.calls: list[str] = []
        self.throttles: list[int] = []
        self.written = 0
        self.loaded = b""
        self.load_error: MigrationError | None = None
        self.running = threading.Event()
        self.stopped_at = 0.0
        self._pages = pages
        self._rate = rate
        self._gate = threading.Lock()
        self._quit = False
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start writing."""
        self.running.set()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        burst = 16
        with self.ram[0].memory.view() as view:
            while not self._quit:
                if not self.running.wait(0.05):
                    continue
                with self._gate:
                    if not self.running.is_set():
                        continue
                    for _ in range(burst):
                        page = self.written % self._pages
                        self.written += 1
                        struct.pack_into("<Q", view, page * PAGE, self.written)
                        struct.pack_into("<Q", view, page * PAGE + PAGE - 8, self.written)
                        self.marks.mark(0, page)
                share = 1 - (self.throttles[-1] if self.throttles else 0) / 100
                if self._rate is None:
                    time.sleep(0.0005 * (1 / share - 1) if share < 1 else 0)
                else:
                    time.sleep(burst / self._rate / share)

    def stop(self) -> None:
        self.stopped_at = time.monotonic()
        self.calls.append("stop")
        self.running.clear()
        with self._gate:
            pass

    def resume(self) -> None:
        self.calls.append("resume")
        self.running.set()

    def throttle(self, percentage: int) -> None:
        self.throttles.append(percentage)

    def save_state(self) -> bytes:
        return self.written.to_bytes(8, "big")

    def load_state(self, state: bytes) -> None:
        if self.load_error is not None:
            raise self.load_error
        self.loaded = state
        self.written = int.from_bytes(state, "big")

    def digests(self) -> list[str]:
        """Of each block as it is now."""
        found = []
        for guest in self.ram:
            with guest.memory.view() as view:
                found.append(hashlib.sha256(view).hexdigest())
        return found

    def close(self) -> None:
        current = header.migrate_get_current()
        if current.guest is self and current.migration is not None:
            current.migration.close()  # of a test that failed: it holds the memory
        self._quit = True
        if self._thread is not None:
            self._thread.join()
        super().close()


def socket_ends(ends, source_cancel, destination_cancel, seconds=20.0):
    """Transports over a pair of sockets, the source's first."""
    links = [
        SocketLink(end, "fd", cancel, TransportLimits(seconds), "the other end")
        for end, cancel in zip(ends, (source_cancel, destination_cancel), strict=True)
    ]
    return (
        PlainOutgoing(links[0], return_path=True, ping=RETURN_PATH_PING),
        PlainIncoming(links[1]),
    )


class Pair:
    """A migration between two guests of this process over a pair of sockets."""

    def __init__(
        self, source: Any, destination: Any, *, total_seconds: float | None = None
    ) -> None:
        self.events: list[Any] = []
        self.out = Migration(self.events.append)
        self.into = Migration()
        self.out_engine = LiveSource(source, total_seconds=total_seconds)
        self.in_engine = LiveDestination(destination)
        self.ends = socket.socketpair()

    def start(self) -> None:
        """Start both."""
        out, into = socket_ends(self.ends, self.out.cancellation, self.into.cancellation)
        self.transports = (out, into)
        for migration, transport, work in (
            (self.into, into, self.in_engine.process),
            (self.out, out, self.out_engine.save),
        ):
            migration.run(lambda m=migration, t=transport, w=work: self._run(m, t, w), "end")

    @staticmethod
    def _run(migration: Migration, transport: Any, work: Any) -> None:
        try:
            file = QEMUFile(transport)
            migration.connected(file)
            work(migration, file, transport)
        except MigrationError:
            transport.abort()
            raise
        finally:
            transport.close()

    def wait(self, seconds: float = 60) -> None:
        """Wait for both; raise what the source raised, or else the destination."""
        failures = []
        for migration in (self.out, self.into):
            try:
                assert migration.wait(seconds), "it does not end"
            except MigrationError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.out.close()
        self.into.close()
        for end in self.ends:
            end.close()


class Destination:
    """Another process that a guest comes to (live_end.py).

    Args:
        uri: where it awaits the guest.
        mib: how much memory it has for it.
    """

    def __init__(self, uri: str, mib: int) -> None:
        program = Path(__file__).with_name("live_end.py")
        self._process = subprocess.Popen(
            [sys.executable, program, uri, str(mib)], stdout=subprocess.PIPE, text=True
        )
        try:
            self.uri = self.answer()["uri"]
        except BaseException:
            self._end()
            raise

    def answer(self) -> dict[str, Any]:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the destination ended with status {self._process.wait()}"
        return json.loads(line)

    def kill(self) -> None:
        """As a host does that is gone."""
        self._process.kill()
        self._process.wait()

    def _end(self) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Destination:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


def guest_of(mib: int, *, pages: int = 2048, rate: float = 4000.0) -> WritingGuest:
    """A guest three quarters of whose memory is noise, each MiB another one."""
    guest = WritingGuest((RamBlock("live.ram", mib * MIB),), pages=pages, rate=rate)
    noise = random.Random(mib).randbytes(MIB)
    with guest.ram[0].memory.view() as view:
        for number in range(mib * 3 // 4):
            view[number * MIB : (number + 1) * MIB] = noise[number:] + noise[:number]
    return guest


def start_to(
    uri: str, guest: WritingGuest, *, options: Any = None, **settings: Any
) -> MigrationState:
    """Begin to migrate a guest, by the header's function for the scheme."""
    pin_all = settings.pop("pin_all", False)
    auto_converge = settings.pop("auto_converge", False)
    state = MigrationState(guest=guest, **settings)
    state.enabled_capabilities[MigrationCapability.RDMA_PIN_ALL] = pin_all
    state.enabled_capabilities[MigrationCapability.AUTO_CONVERGE] = auto_converge
    scheme, _, address = uri.partition(":")
    getattr(header, f"{scheme}_start_outgoing_migration")(state, address, options=options)
    return state


def check_arrival(state: MigrationState, guest: WritingGuest, destination: Destination) -> None:
    """A guest that was writing is there as it was when it stopped, within the downtime allowed."""
    assert state.migration is not None
    assert state.migration.wait(120), "it does not end"
    arrived = destination.answer()
    # The source rests; the destination has looked before it let the guest go on.
    assert arrived["digests"] == guest.digests()
    assert arrived["written"] == guest.written > 0
    assert guest.calls[-1] == "stop"
    assert state.status is MigrationStatus.COMPLETED
    limit = state.max_downtime / 1e6
    assert 0 <= state.downtime <= limit
    assert (arrived["resumed_at"] - guest.stopped_at) * 1000 <= limit
    # It was sent while it was written.
    assert state.rounds >= 2
    assert state.dirty_sync_count >= 3
    assert state.precopy_bytes > state.downtime_bytes
    assert destination.answer()["goes_on"]
    print(
        f"{state.ram_total >> 20} MiB: {state.total_time} ms, {state.rounds} rounds, downtime "
        f"{state.downtime} ms, {(arrived['resumed_at'] - guest.stopped_at) * 1000:.0f} ms until it "
        f"was to go on, {state.mbps:.0f} Mbit/s, {guest.written} pages written meanwhile"
    )


def check_throttled(state: MigrationState, guest: WritingGuest, destination: Destination) -> None:
    """A guest that writes faster than the link carries was slowed down until it could go."""
    assert state.migration is not None
    assert state.migration.wait(240), "it does not end"
    arrived = destination.answer()
    assert arrived["digests"] == guest.digests()
    assert arrived["written"] == guest.written
    assert state.downtime <= state.max_downtime / 1e6
    # By 20 % at first, then by 10 more at a time; at the end not at all.
    assert guest.throttles[:-1] == [20 + 10 * step for step in range(len(guest.throttles) - 1)]
    assert len(guest.throttles) >= 2
    assert guest.throttles[-1] == state.throttle_percentage == 0
    print(f"throttled by {guest.throttles}, {state.total_time} ms, downtime {state.downtime} ms")


def check_too_fast(state: MigrationState, guest: WritingGuest, destination: Destination) -> None:
    """One that is not slowed down goes on here when the time is over, and that is said."""
    assert state.migration is not None
    with pytest.raises(MigrationTimeout, match="the guest did not converge within") as caught:
        state.migration.wait(240)
    said = str(caught.value)
    assert "KiB are left, it dirties" in said
    assert "goes on running" in said
    assert "auto-converge" in said
    assert guest.calls == guest.throttles == []
    before = guest.written
    end = time.monotonic() + 20
    while guest.written <= before + 100:
        assert time.monotonic() < end, "it does not go on"
        time.sleep(0.01)
    answer = destination.answer()
    assert "the guest is still the source's" in answer["error"]
    assert not answer["resumed"]
    print(said)


def check_counters(state: MigrationState) -> None:
    """With RDMA: bytes written, 1 for each page handed over, 8 for the end of each round."""
    counters = state.counters
    handed_over = counters.normal_pages + counters.duplicate_pages
    assert counters.transferred == counters.normal_bytes + handed_over + 8 * state.rounds


def migrate(current, guest, connection, **settings):
    """Send a guest; return the state afterwards."""
    for name, value in settings.items():
        setattr(current, name, value)
    header.migrate_set_guest(guest)
    current.file = connection[0]
    header.migrate_fd_connect(current)
    header.migrate_get_current().migration.wait(60)
    return header.migrate_get_current()


__all__ = [
    "BLOCKS",
    "MIB",
    "Destination",
    "Marks",
    "Pair",
    "RemoteProtocolError",
    "WritingGuest",
    "check_arrival",
    "check_counters",
    "check_throttled",
    "check_too_fast",
    "guest_of",
    "migrate",
    "socket_ends",
    "start_to",
]
