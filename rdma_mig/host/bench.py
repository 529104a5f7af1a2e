# SPDX-License-Identifier: Apache-2.0
"""What two hosts and the path between them give a migration: measured, and what follows from it.

The asking end leads: it says over TCP what it wants next, the serving end prepares it and says
where. In this order: RDMA writes, the same bytes over TCP, and one real migration.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rdma_mig.channel.sockets import SocketListener, connect
from rdma_mig.errors import MigrationError, RemoteProtocolError
from rdma_mig.host.meeting import Meeting, await_other, join
from rdma_mig.host.prediction import Path
from rdma_mig.host.sample import SAMPLE_SIZE, Sample, receive_sample
from rdma_mig.host.writes import BandwidthRow, Prepared, Target, WriteSource, WriteTarget
from rdma_mig.memory.guest import GuestMemory
from rdma_mig.memory.meminfo import available_memory
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.waits import Cancel, Deadline, TransportLimits
from rdma_mig.wire.uri import TcpAddress

__all__ = ["QUEUE_PAIRS_MAX", "Bench", "Plan", "Trial", "measure", "serve"]

QUEUE_PAIRS_MAX = 64
"""Connections that one run may ask for."""

_MIB = 1 << 20
_ANSWER_SECONDS = 120.0
_STEP = 0.2
_REGION_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    Attributes:
        sizes: bytes of a write, each at most ``region``.
        queue_pairs: each size is measured with one; the largest with each of these numbers too.
        iterations: writes of one measurement; None for as many as carry ``region`` four times.
        region: bytes of memory that is written to, a multiple of 16 MiB.
        trial: bytes of the real migration, a multiple of 16 MiB; 0 for none.
        device: the only device of this host to use; None for any.
        gid_index: the GID of it; None for any.
    """

    sizes: tuple[int, ...]
    queue_pairs: tuple[int, ...] = (1,)
    iterations: int | None = None
    region: int = 256 * _MIB
    trial: int = 256 * _MIB
    device: str | None = None
    gid_index: int | None = None

    def count(self, size: int) -> int:
        """Iterations of one measurement."""
        return self.iterations or max(4 * self.region // size, 1)


@dataclass(frozen=True, slots=True)
class Trial:
    """One real migration.

    Attributes:
        bytes: of memory, all of it random.
        setup_seconds: up to the exchange of the blocks.
        transfer_seconds: RAM.
    """

    bytes: int
    setup_seconds: float
    transfer_seconds: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.setup_seconds + self.transfer_seconds


@dataclass(slots=True)
class Bench:
    """What was measured.

    Attributes:
        peer, device, transport, mtu: of the path.
        rows: RDMA writes.
        ours, theirs: preparing memory at this end and at the other one.
        tcp_bytes_per_second: the same memory over TCP.
        trial: a real migration; None where none was wanted.
    """

    peer: str
    device: str
    transport: str
    mtu: int | None
    rows: list[BandwidthRow] = field(default_factory=list)
    ours: Prepared = field(default_factory=lambda: Prepared(0.0, 0.0))
    theirs: Prepared = field(default_factory=lambda: Prepared(0.0, 0.0))
    tcp_bytes_per_second: float = 0.0
    trial: Trial | None = None

    @property
    def rdma(self) -> Path:
        """The way over RDMA, pin-all: by the best that one queue pair did.

        The source's memory is in use, so it is only registered; the destination's is new. Both ends
        prepare at the same time.
        """
        best = max(row.average for row in self.rows if row.queue_pairs == 1)
        setup = max(self.ours.register_seconds_per_gib / (1 << 30), self.theirs.seconds_per_byte)
        return Path("RDMA", best, setup)

    @property
    def tcp(self) -> Path:
        """The way over TCP, where nothing is prepared."""
        return Path("TCP", self.tcp_bytes_per_second)


def measure(host: str, port: int, plan: Plan, cancel: Cancel, say: Callable[[str], None]) -> Bench:
    """Lead a run with a host that serves.

    Args:
        host, port: where it serves.
        plan: what is measured.
        cancel: ends every wait.
        say: told what is measured next.

    Raises:
        HostError: nobody serves there, or this host cannot do it.
        MigrationError: it broke.
    """
    options = EndpointOptions(device=plan.device, gid_index=plan.gid_index)
    with join(host, port, cancel, "bench") as meeting:
        say("RDMA writes")
        bench = _measure_writes(meeting, plan, cancel, options)
        say("TCP")
        bench.tcp_bytes_per_second = _measure_tcp(meeting, plan.region, cancel)
        if plan.trial:
            say("a migration")
            bench.trial = _try_migration(meeting, plan, cancel, options)
        meeting.send(want="nothing")
    return bench


def _asked(meeting: Meeting, **wanted: Any) -> dict[str, Any]:
    """Ask for something, and wait until it is prepared."""
    meeting.send(**wanted)
    answer = meeting.receive("its answer", _ANSWER_SECONDS)
    if "error" in answer:
        raise MigrationError(
            f"{meeting.peer} cannot: {_text(answer.get('error'))}",
            remedy=_text(answer.get("remedy", "")),
        )
    return answer


def _text(value: object) -> str:
    """Somebody else's words, fit to be shown."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)[:1000])


def _measure_writes(
    meeting: Meeting, plan: Plan, cancel: Cancel, options: EndpointOptions
) -> Bench:
    most = max(plan.queue_pairs)
    answer = _asked(meeting, want="writes", region=plan.region, queue_pairs=most)
    uris = answer.get("uris")
    if not isinstance(uris, list) or len(uris) != most or not all(type(u) is str for u in uris):
        raise RemoteProtocolError(f"{meeting.peer} does not say where its queue pairs listen")
    with WriteSource(uris, plan.region, cancel, options) as source:
        ready = meeting.receive("its memory", _ANSWER_SECONDS)
        route = source.route
        bench = Bench(meeting.peer, route.device, route.transport, route.mtu)
        bench.ours = source.prepare()
        bench.theirs = _prepared(ready.get("prepared"), meeting.peer)
        source.aim(_targets(ready.get("targets"), most, meeting.peer))
        largest = max(plan.sizes)
        source.measure(largest, 1, max(plan.region // largest, 1))  # all memory is touched once
        cells = [(size, 1) for size in plan.sizes]
        cells += [(largest, number) for number in plan.queue_pairs if number > 1]
        bench.rows = [source.measure(size, number, plan.count(size)) for size, number in cells]
        meeting.send(done=True)
    return bench


def _prepared(value: object, peer: str) -> Prepared:
    match value:
        case [int() | float() as populate, int() | float() as register] if (
            0 <= populate < 1e6 and 0 <= register < 1e6
        ):
            return Prepared(float(populate), float(register))
    raise RemoteProtocolError(f"{peer} does not say how long preparing its memory took")


def _targets(value: object, count: int, peer: str) -> list[Target]:
    found = []
    for one in value if isinstance(value, list) else ():
        match one:
            case [int() as address, int() as rkey] if 0 < address < 1 << 64 and 0 < rkey < 1 << 32:
                found.append(Target(address, rkey))
    if len(found) != count:
        raise RemoteProtocolError(f"{peer} does not say where its memory is")
    return found


def _measure_tcp(meeting: Meeting, size: int, cancel: Cancel) -> float:
    answer = _asked(meeting, want="tcp", size=size)
    port = answer.get("port")
    if type(port) is not int or not 0 < port < 65536:
        raise RemoteProtocolError(f"{meeting.peer} does not say where it listens")
    with GuestMemory(size, "bench") as memory:
        memory.populate(lambda: cancel.requested)
        with (
            connect(TcpAddress(meeting.peer_host, port), cancel, TransportLimits) as link,
            link.silence_limited(_ANSWER_SECONDS),
            memory.view() as view,
        ):
            began = time.monotonic()
            link.write(view, "memory over TCP")
            # Its end shows that all has arrived, and not merely been taken by this kernel.
            link.read("the end of it")
            seconds = time.monotonic() - began
    return size / max(seconds, 1e-9)


def _try_migration(meeting: Meeting, plan: Plan, cancel: Cancel, options: EndpointOptions) -> Trial:
    from rdma_mig.migration.rdma import RdmaOptions, rdma_start_outgoing_migration
    from rdma_mig.migration.state import Migration

    answer = _asked(meeting, want="migration", size=plan.trial)
    sample = Sample.make(plan.trial)
    with sample.ram, Migration() as migration:
        rdma_start_outgoing_migration(
            migration,
            str(answer.get("uri")),
            ram=sample.ram,
            save=sample.save,
            options=RdmaOptions(pin_all=True, total_seconds=_ANSWER_SECONDS, endpoint=options),
        )
        while not migration.wait(_STEP):
            if cancel.requested:
                migration.cancel()
    meeting.receive("its word on the migration", _ANSWER_SECONDS)
    return Trial(plan.trial, sample.setup_seconds, sample.transfer_seconds)


# ---- the serving end ----


def serve(
    host: str,
    port: int,
    cancel: Cancel,
    listening: Callable[[str], None],
    options: EndpointOptions | None = None,
) -> str:
    """Play the other part for one host that asks.

    Args:
        host, port: where to listen; port 0 takes a free one.
        cancel: ends every wait.
        listening: told HOST:PORT when the other end can come.
        options: which device of this host to use.

    Returns:
        HOST:PORT of the end that asked.

    Raises:
        HostError: this host cannot listen there.
        MigrationError: it broke.
    """
    options = options or EndpointOptions()
    with await_other(host, port, cancel, "bench", listening) as meeting:
        while True:
            asked = meeting.receive("what it wants", _ANSWER_SECONDS)
            try:
                match asked:
                    case {
                        "want": "writes",
                        "region": int() as size,
                        "queue_pairs": int() as most,
                    }:
                        _require(1 <= most <= QUEUE_PAIRS_MAX, meeting, f"{most} queue pairs")
                        _take_writes(meeting, _size(meeting, size), most, cancel, options)
                    case {"want": "tcp", "size": int() as size}:
                        _take_tcp(meeting, _size(meeting, size), cancel)
                    case {"want": "migration", "size": int() as size}:
                        _take_migration(meeting, _size(meeting, size), cancel, options)
                    case {"want": "nothing"}:
                        return meeting.peer
                    case _:
                        raise RemoteProtocolError(f"{meeting.peer} wants what is not known here")
            except MigrationError as error:
                with contextlib.suppress(MigrationError):
                    meeting.send(error=error.message, remedy=error.remedy)
                raise


def _require(true: bool, meeting: Meeting, what: str) -> None:
    if not true:
        raise RemoteProtocolError(f"{meeting.peer} wants {what}")


def _size(meeting: Meeting, size: int) -> int:
    """Check a number of bytes before anything is allocated for it."""
    allowed = min(_REGION_MAX, available_memory() // 2)
    _require(
        0 < size <= allowed and size % SAMPLE_SIZE == 0,
        meeting,
        f"{size} bytes of memory; here up to {allowed >> 20} MiB, in steps of 16, can be had",
    )
    return size


def _take_writes(
    meeting: Meeting, region: int, most: int, cancel: Cancel, options: EndpointOptions
) -> None:
    with WriteTarget(
        meeting.local_host, region, most, meeting.peer_host, cancel, options
    ) as target:
        meeting.send(uris=target.uris)
        targets, prepared = target.accept()
        meeting.send(
            targets=[[one.address, one.rkey] for one in targets],
            prepared=[prepared.populate_seconds_per_gib, prepared.register_seconds_per_gib],
        )
        meeting.receive("the end of its writes", 3600.0)


def _take_tcp(meeting: Meeting, size: int, cancel: Cancel) -> None:
    def guard(client: str) -> str:
        return "" if client == meeting.peer_host else "this end measures with another host"

    with SocketListener(TcpAddress(meeting.local_host, 0), cancel, guard) as listener:
        assert isinstance(listener.address, TcpAddress)
        meeting.send(port=listener.address.port)
        limit = Deadline.after(_ANSWER_SECONDS)
        link = listener.accept(limit, TransportLimits, "the memory over TCP")
    with link, link.silence_limited(_ANSWER_SECONDS):
        left = size
        while left > 0:
            data = link.read("memory over TCP")
            if not data:
                raise RemoteProtocolError(f"{meeting.peer} sent {size - left} of {size} bytes")
            left -= len(data)


def _take_migration(meeting: Meeting, size: int, cancel: Cancel, options: EndpointOptions) -> None:
    from rdma_mig.migration.rdma import RdmaOptions, rdma_start_incoming_migration
    from rdma_mig.migration.state import Migration

    where = f"[{meeting.local_host}]" if ":" in meeting.local_host else meeting.local_host
    with Migration() as migration:
        address = rdma_start_incoming_migration(
            f"rdma:{where}:0",
            migration=migration,
            process=functools.partial(receive_sample, size=size),
            options=RdmaOptions(
                accept_seconds=_ANSWER_SECONDS,
                total_seconds=_ANSWER_SECONDS,
                allow=(meeting.peer_host,),
                endpoint=options,
            ),
        )
        meeting.send(uri=str(address))
        while not migration.wait(_STEP):
            if cancel.requested:
                migration.cancel()
    meeting.send(done=True)
