# SPDX-License-Identifier: Apache-2.0
"""Raw RDMA writes between two hosts, timed: what a migration's data path has at its disposal.

The same queue pairs, write queue and registration as a migration's, over as much memory as was
agreed on, so that no cached buffer flatters the figures.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdma_mig.closing import Closing
from rdma_mig.memory.guest import GuestMemory
from rdma_mig.verbs.connector import connect
from rdma_mig.verbs.endpoint import Endpoint, EndpointOptions
from rdma_mig.verbs.listener import Listener
from rdma_mig.verbs.loading import load
from rdma_mig.verbs.route import Route, route_of
from rdma_mig.waits import Cancel, Deadline
from rdma_mig.wire.address import RdmaAddress

if TYPE_CHECKING:
    from rdma_mig import _verbs

__all__ = ["BandwidthRow", "Prepared", "Target", "WriteSource", "WriteTarget"]

_DOING = "the completion of writes"
_ACCEPT_SECONDS = 30.0
_WRITES_SECONDS = 120.0
# What a peak is taken over.
_PEAK_SECONDS = 0.01
# Writes that one queue pair is given before the next one's turn.
_TURN = 32


@dataclass(frozen=True, slots=True)
class Prepared:
    """What it took to prepare memory.

    Attributes:
        populate_seconds_per_gib, register_seconds_per_gib: allocating pages; registering them.
    """

    populate_seconds_per_gib: float
    register_seconds_per_gib: float

    @property
    def seconds_per_byte(self) -> float:
        """Both."""
        return (self.populate_seconds_per_gib + self.register_seconds_per_gib) / (1 << 30)


@dataclass(frozen=True, slots=True)
class Target:
    """Where writes go: an address in the other host, and its key."""

    address: int
    rkey: int


@dataclass(frozen=True, slots=True)
class BandwidthRow:
    """One measurement, under perftest's names.

    Attributes:
        size: bytes of a write (MsgSize).
        queue_pairs: that share the work.
        iterations: writes (n_iterations).
        peak, average: bytes a second (BW_peak, BW_average); peak is the best that was
            seen over some 10 ms.
    """

    size: int
    queue_pairs: int
    iterations: int
    peak: float
    average: float

    @property
    def message_rate(self) -> float:
        """Writes a second, in millions (MsgRate)."""
        return self.average / self.size / 1e6


class _Region(Closing):
    """Memory that nobody has touched before, and how long it takes to make it usable."""

    def __init__(self, length: int, cancel: Cancel) -> None:
        self._gib = length / (1 << 30)
        self._register_seconds = 0.0
        self.memory = GuestMemory(length, "bench")
        began = time.monotonic()
        try:
            self.memory.populate(lambda: cancel.requested)
        except BaseException:
            self.close()
            raise
        self._populate_seconds = time.monotonic() - began

    def register(self, endpoint: Endpoint, *, remote: bool) -> _verbs.MemoryRegion:
        """Register all of it; the endpoint closes the region."""
        began = time.monotonic()
        region = endpoint.register(
            self.memory.address,
            self.memory.length,
            what="the memory to measure with",
            remote_write=remote,
            holder=self.memory.hold("its memory region"),
        )
        self._register_seconds = time.monotonic() - began
        return region

    @property
    def prepared(self) -> Prepared:
        """How long it took; registering, the last time."""
        return Prepared(self._populate_seconds / self._gib, self._register_seconds / self._gib)

    def close(self) -> None:
        """Free it. Idempotent."""
        self.memory.close()


class WriteTarget(Closing):
    """The end that is written to.

    Args:
        host: address to listen at.
        region: bytes of memory.
        queue_pairs: how many connections it will take.
        peer_host: the only host that may connect.
        cancel: ends every wait.
        options: of the connections.

    Attributes:
        uris: where the queue pairs listen, in the order in which they are accepted.

    Raises:
        HostError: this host cannot listen there.
    """

    def __init__(
        self,
        host: str,
        region: int,
        queue_pairs: int,
        peer_host: str,
        cancel: Cancel,
        options: EndpointOptions,
    ) -> None:
        self._listeners: list[Listener] = []
        self._endpoints: list[Endpoint] = []
        # Before anybody connects: it takes a while, and a client does not wait for long.
        self._region = _Region(region, cancel)

        def guard(client: str) -> str:
            return "" if client == peer_host else "this end measures with another host"

        try:
            for _ in range(queue_pairs):
                self._listeners.append(Listener(host, 0, cancel, options, guard))
        except BaseException:
            self.close()
            raise
        self.uris = [str(RdmaAddress(*listener.address)) for listener in self._listeners]

    def accept(self) -> tuple[list[Target], Prepared]:
        """Take all connections; say where the memory is, and how long preparing it took."""
        for listener in self._listeners:
            limit = Deadline.after(_ACCEPT_SECONDS)
            self._endpoints.append(listener.accept(lambda _data, _peer: b"", limit))
        regions = [self._region.register(endpoint, remote=True) for endpoint in self._endpoints]
        return [Target(region.address, region.rkey) for region in regions], self._region.prepared

    def close(self) -> None:
        """End all connections. Idempotent."""
        for end in (*self._endpoints, *self._listeners):
            end.close()
        self._region.close()


class _Queue:
    """One queue pair, and where in the memory it is."""

    def __init__(
        self,
        endpoint: Endpoint,
        region: _verbs.MemoryRegion,
        target: Target,
        length: int,
        size: int,
    ) -> None:
        self._endpoint = endpoint
        self._work = endpoint.queue
        self._deadline = Deadline.after(_WRITES_SECONDS)
        self._writes = load().WriteQueue(
            self._work, chunk_size=1 << 40, max_write=size, interrupted=self._interrupted
        )
        self._writes.deadline_ns = self._deadline.ns
        self._writes.set_targets(
            [(region.address, region.lkey, target.address, target.rkey, length)]
        )
        self._writes.open()
        self._size = size
        self._slots = length // size
        self._slot = 0

    def _interrupted(self, outcome: int) -> None:
        self._endpoint.interrupted(outcome, _DOING, self._deadline)

    def write(self, count: int) -> int:
        """Post some more, and wait only where the queue is full; return how many."""
        rows = array("Q")
        for _ in range(count):
            rows.extend((self._slot * self._size, self._size))
            self._slot = (self._slot + 1) % self._slots
        if count:
            self._writes.save_runs(0, memoryview(rows).cast("B").cast("Q", [count, 2]))
        return count

    @property
    def completed(self) -> int:
        """Writes that have arrived."""
        self._work.poll()
        return int(self._writes.writes - self._work.outstanding_writes)

    def wait(self) -> None:
        """Wait until all have."""
        self._endpoint.wait(load().WAIT_WRITES, _DOING, self._deadline)
        self._writes.close()


class WriteSource(Closing):
    """The end that writes.

    Args:
        uris: of the target's queue pairs.
        region: bytes of memory, as agreed on.
        cancel: ends every wait.
        options: of the connections.

    Attributes:
        route: of the first connection.

    Raises:
        MigrationError: it cannot connect.
    """

    def __init__(
        self, uris: list[str], region: int, cancel: Cancel, options: EndpointOptions
    ) -> None:
        self._cancel = cancel
        self._endpoints: list[Endpoint] = []
        self._region = _Region(region, cancel)
        self._regions: list[_verbs.MemoryRegion] = []
        self._targets: list[Target] = []
        try:
            for uri in uris:
                address = RdmaAddress.parse(uri, listening=False)
                self._endpoints.append(connect(address.host, address.port, b"", cancel, options))
        except BaseException:
            self.close()
            raise
        self.route: Route = route_of(self._endpoints[0].cmid, self._endpoints[0].path)

    def prepare(self) -> Prepared:
        """Register this end's memory for each queue pair; say how long preparing it took."""
        self._regions = [
            self._region.register(endpoint, remote=False) for endpoint in self._endpoints
        ]
        return self._region.prepared

    def aim(self, targets: list[Target]) -> None:
        """Say where the other end's memory is, for each queue pair."""
        self._targets = targets

    def measure(self, size: int, queue_pairs: int, iterations: int) -> BandwidthRow:
        """Write ``iterations`` times ``size`` bytes, over the memory from end to end and again.

        Raises:
            MigrationError: the connection broke, or it was cancelled.
        """
        queues = [
            _Queue(endpoint, region, target, self._region.memory.length, size)
            for endpoint, region, target in zip(
                self._endpoints[:queue_pairs],
                self._regions[:queue_pairs],
                self._targets[:queue_pairs],
                strict=True,
            )
        ]
        peak = 0.0
        began = last = time.monotonic()
        posted = before = 0
        while posted < iterations:
            # A queue that never runs full does not wait, and so would not notice.
            self._cancel.check("measuring RDMA writes")
            for queue in queues:
                posted += queue.write(min(_TURN, iterations - posted))
            now = time.monotonic()
            if now - last >= _PEAK_SECONDS:
                completed = sum(queue.completed for queue in queues)
                peak = max(peak, (completed - before) * size / (now - last))
                last, before = now, completed
        for queue in queues:
            queue.wait()
        average = iterations * size / max(time.monotonic() - began, 1e-9)
        return BandwidthRow(size, queue_pairs, iterations, max(peak, average), average)

    def close(self) -> None:
        """End all connections. Idempotent."""
        for endpoint in self._endpoints:
            endpoint.close()
        self._region.close()
