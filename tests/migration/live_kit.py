# SPDX-License-Identifier: Apache-2.0
"""Live guests for the tests: memory that a thread writes, and a stream between two sockets."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

from rdma_mig.channel.link import SocketLink
from rdma_mig.channel.plain import PlainIncoming, PlainOutgoing
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import MigrationError, RemoteProtocolError
from rdma_mig.memory import DirtyBitmap, RamBlock
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.guests import ProcessGuest
from rdma_mig.migration.live import LiveSource
from rdma_mig.migration.load import LiveDestination
from rdma_mig.migration.state import Migration
from rdma_mig.waits import TransportLimits
from rdma_mig.wire.return_path import RETURN_PATH_PING

MIB = 1 << 20
PAGE = 4096
MACHINE = "live-1.0"


class Marks:
    """Explicit marks behind a lock: the owner marks after writing."""

    atomic = True

    def __init__(self, ram: GuestRam) -> None:
        self._lock = threading.Lock()
        self._marks = [DirtyBitmap.of_length(guest.block.length) for guest in ram]
        self.started = False

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.started = False

    def mark(self, index: int, first: int, count: int = 1) -> None:
        with self._lock:
            self._marks[index].set(first, count)

    def harvest(self, index: int, into: DirtyBitmap) -> int:
        with self._lock:
            marks = self._marks[index]
            found = marks.count()
            if found:
                theirs, ours = into.words, marks.words
                for at, word in enumerate(ours):
                    if word:
                        theirs[at] |= word
                marks.fill(False)
        return found


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
        began = time.monotonic()
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
        del began

    def stop(self) -> None:
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


__all__ = ["MIB", "Marks", "Pair", "RemoteProtocolError", "WritingGuest", "socket_ends"]
