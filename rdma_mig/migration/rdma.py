# SPDX-License-Identifier: Apache-2.0
"""``rdma_start_incoming_migration`` and ``rdma_start_outgoing_migration`` of migration.h.

They check their arguments and this host at once, and return when listening or connecting has
begun; the rest runs on the migration's worker thread, where the engine's function is called with
the migration file, its hooks in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import AT_SOURCE
from rdma_mig.errors import LocalProtocolError, MigrationError
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.clients import client_guard, warn_if_open
from rdma_mig.migration.engines import incoming_engine, outgoing_engine
from rdma_mig.migration.events import Connected, Listening, MigrationEvent, Warned
from rdma_mig.migration.failures import complete_failure
from rdma_mig.migration.running import run_engine
from rdma_mig.migration.state import Migration
from rdma_mig.migration.status import MigrationCapability, MigrationState, MigrationStatus
from rdma_mig.transport.outgoing import STREAM_MESSAGE, RdmaOutgoing
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.verbs.host import require_rdma
from rdma_mig.verbs.loading import load
from rdma_mig.verbs.route import is_ethernet
from rdma_mig.waits import Deadline, TransportLimits
from rdma_mig.wire.address import RdmaAddress
from rdma_mig.wire.control import CONTROL_MAX_PAYLOAD
from rdma_mig.wire.handshake import MAX_CONNECTIONS

if TYPE_CHECKING:
    from rdma_mig.transport.incoming import IncomingListener, RdmaIncoming

__all__ = ["RdmaOptions", "rdma_start_incoming_migration", "rdma_start_outgoing_migration"]


@dataclass(frozen=True, slots=True)
class RdmaOptions:
    """Options of a migration over RDMA.

    Attributes:
        pin_all: register all RAM at the start (QEMU's capability rdma-pin-all) instead of chunk
            by chunk on first use; outgoing only, since a destination does as the source asks.
        assume_zero: take RAM blocks of 64 MiB and more of a destination that does not say so for
            all zero, and send no zeros there; outgoing only. Wrong RAM where they are not.
        return_path: open the connection on which a destination says how it ended; outgoing only,
            since a destination takes what the source opens.
        total_seconds: limit on the whole migration; None for none.
        stall_seconds: how long a live peer may say nothing; None for ever.
        allow: networks that a source may come from, as ``ipaddress.ip_network()`` takes them; none
            for everywhere; incoming only. Others are turned away, and waiting goes on.
        accept_seconds: limit on the wait for a source; None for none.
        endpoint: sizes and limits of the connection.
        connections: over how many RAM is written, 1 to 16, for hardware that one queue pair cannot
            fill; outgoing only. Between two rdma-migrate: a QEMU takes one.
        stream_message: bytes of the stream that a source puts into one message at most, 1 to
            524272. Where it is cut has no meaning to a destination.

    Raises:
        LocalProtocolError: a size or number that no destination takes.
    """

    pin_all: bool = False
    assume_zero: bool = False
    return_path: bool = False
    allow: tuple[str, ...] = ()
    total_seconds: float | None = None
    stall_seconds: float | None = None
    accept_seconds: float | None = None
    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    stream_message: int = STREAM_MESSAGE
    connections: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.stream_message <= CONTROL_MAX_PAYLOAD:
            raise LocalProtocolError(
                f"messages of {self.stream_message} bytes, allowed are 1 to {CONTROL_MAX_PAYLOAD}"
            )
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise LocalProtocolError(
                f"{self.connections} connections, allowed are 1 to {MAX_CONNECTIONS}"
            )


def rdma_start_incoming_migration(
    host_port: str,
    *,
    migration: Migration | None = None,
    process: Callable[[Migration, QEMUFile, RdmaIncoming], None] | None = None,
    options: RdmaOptions | None = None,
) -> RdmaAddress:
    """Listen for a source, and process its migration on the worker thread.

    Args:
        host_port: ``HOST:PORT``, or ``rdma:HOST:PORT``; port 0 takes a free one.
        migration: owns what is started; becomes the process's current one. None, as in the
            header: the process's own, with what is set for it.
        process: the engine: loads the stream from the file. It attaches RAM to the transport
            when it has read the block list (the header leaves that to QEMU's global RAM list).
            None for `process_incoming_migration`.
        options: limits and sizes.

    Returns:
        the address that a source can connect to, as bound.

    Raises:
        UsageError: the URI cannot be used.
        HostError: this host cannot listen there, or has no RDMA.
        LocalProtocolError: another migration is under way.
    """
    from rdma_mig.transport.incoming import IncomingListener

    options = options or RdmaOptions()
    address = RdmaAddress.parse(_uri(host_port), listening=True)
    migration, load_stream = incoming_engine(migration, process)
    migration.become_current()
    load()
    guard = client_guard(migration, options.allow)
    endpoint = replace(options.endpoint, trace=migration.trace)
    work = migration

    def refused(peer: str, why: str) -> None:
        work.emit(Warned(f"turned {peer} away: {why}"))

    listener = IncomingListener(address, migration.cancellation, endpoint, guard, refused)
    try:
        if _quarrels_with_qemu(listener):
            migration.emit(
                Warned(
                    f"a QEMU up to 10.0 refuses IPv6 on RoCE and cannot connect to "
                    f"{listener.address}: for one, listen at an IPv4 address"
                )
            )
        migration.emit(Listening(str(listener.address)))
        if guard is None:
            warn_if_open(migration, listener.address.host)
        migration.run(lambda: _incoming(work, listener, load_stream, options), "rdma-mig-incoming")
    except BaseException:
        listener.close()
        raise
    return listener.address


def _uri(host_port: str) -> str:
    """The URI; the header's functions are given what stands behind its scheme."""
    scheme = f"{RdmaAddress.scheme}:"
    return host_port if host_port.startswith(scheme) else scheme + host_port


def _quarrels_with_qemu(listener: IncomingListener) -> bool:
    """Whether it listens at an IPv6 address of an Ethernet device, and only there."""
    return ":" in listener.address.host and bool(listener.device) and is_ethernet(listener.device)


def _incoming(
    migration: Migration,
    listener: IncomingListener,
    process: Callable[[Migration, QEMUFile, RdmaIncoming], None],
    options: RdmaOptions,
) -> None:
    migration.state.step = "waiting for a source"
    # Also of one that is turned away, or that never comes.
    migration.state.owner = AT_SOURCE
    try:
        transport = listener.accept(
            Deadline.after(options.accept_seconds),
            TransportLimits(options.total_seconds, options.stall_seconds),
        )
        migration.advance(MigrationStatus.ACTIVE)
        run_engine(
            migration,
            transport,
            process,
            other="source",
            tell=[_connected(transport)],
            hooks=transport,
        )
    finally:
        listener.close()


def _connected(transport: RdmaIncoming | RdmaOutgoing) -> Connected:
    return Connected.over(
        transport.route, pin_all=transport.pin_all, connections=transport.connections
    )


def rdma_start_outgoing_migration(
    state: Migration | MigrationState,
    host_port: str,
    *,
    ram: GuestRam | None = None,
    save: Callable[[Migration, QEMUFile, RdmaOutgoing], None] | None = None,
    options: RdmaOptions | None = None,
) -> None:
    """Connect to a destination, and save to it on the worker thread.

    Args:
        state: the migration that owns what is started; becomes the process's current one. With
            the header's `MigrationState`, one is made with what is set there.
        host_port: ``HOST:PORT``, or ``rdma:HOST:PORT``.
        ram: the guest's RAM; it must outlive the migration. None for that of the state's guest.
        save: the engine: writes the stream to the file and calls the RAM hooks. None for
            `migrate_fd_connect`, with the state's guest.
        options: limits and sizes; None for what the capabilities say.

    Raises:
        UsageError: the URI cannot be used, or block devices were asked for.
        HostError: this host has no RDMA.
        LocalProtocolError: another migration is under way.
        MigrationError: migrations are blocked (`migrate_add_blocker`).
    """
    address = RdmaAddress.parse(_uri(host_port), listening=False)
    migration, engine = outgoing_engine(
        state, save, None if options is None else options.total_seconds
    )
    settings = migration.state
    work = options or RdmaOptions(pin_all=settings.enabled(MigrationCapability.RDMA_PIN_ALL))
    memory = settings.require_guest().ram if ram is None else ram
    migration.become_current()
    require_rdma()
    load()
    migration.run(lambda: _outgoing(migration, address, memory, engine, work), "rdma-mig-outgoing")


def _outgoing(
    migration: Migration,
    address: RdmaAddress,
    ram: GuestRam,
    save: Callable[[Migration, QEMUFile, RdmaOutgoing], None],
    options: RdmaOptions,
) -> None:
    migration.state.step = "connecting"
    try:
        transport = RdmaOutgoing(
            address,
            ram,
            migration.cancellation,
            replace(options.endpoint, trace=migration.trace),
            TransportLimits(options.total_seconds, options.stall_seconds),
            pin_all=options.pin_all,
            assume_zero=options.assume_zero,
            return_path=options.return_path,
            stream_message=options.stream_message,
            connections=options.connections,
        )
    except MigrationError as error:
        complete_failure(error, f"{address.host}:{address.port}", "destination")
        raise
    tell: list[MigrationEvent] = [_connected(transport)]
    if options.pin_all and not transport.pin_all:
        tell.append(Warned(f"{transport.peer} refused rdma-pin-all: RAM is pinned as it is used"))
    if transport.connections < options.connections:
        tell.append(
            Warned(
                f"{transport.peer} takes {transport.connections} of {options.connections} "
                "connections for RAM"
            )
        )
    run_engine(migration, transport, save, other="destination", tell=tell, hooks=transport)
