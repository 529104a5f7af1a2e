# SPDX-License-Identifier: Apache-2.0
"""``*_start_incoming_migration`` and ``*_start_outgoing_migration`` of migration.h, without RDMA.

Arguments are what stands behind the scheme in a URI, as in the header. Like those of RDMA, they
check their arguments and this host at once, and return when listening or connecting has begun; the
rest runs on the migration's worker thread.
"""

from __future__ import annotations

from collections.abc import Callable

from rdma_mig.channel.files import FileReader, FileWriter
from rdma_mig.channel.link import Link, inherited_link
from rdma_mig.channel.plain import PlainIncoming, PlainOutgoing
from rdma_mig.channel.process import ProcessLink
from rdma_mig.channel.sockets import SocketListener, connect
from rdma_mig.channel.transport import AT_SOURCE
from rdma_mig.errors import MigrationError, UsageError
from rdma_mig.migration.clients import client_guard, warn_if_open
from rdma_mig.migration.engines import Process, Save, incoming_engine, outgoing_engine
from rdma_mig.migration.events import Connected, Listening
from rdma_mig.migration.failures import complete_failure
from rdma_mig.migration.options import ChannelOptions
from rdma_mig.migration.running import run_engine
from rdma_mig.migration.state import Migration, MigrationState, MigrationStatus
from rdma_mig.waits import Deadline
from rdma_mig.wire.return_path import RETURN_PATH_PING
from rdma_mig.wire.uri import (
    ExecAddress,
    FdAddress,
    FileAddress,
    MigrationAddress,
    RdmaAddress,
    TcpAddress,
    UnixAddress,
    parse_uri,
)

__all__ = [
    "ChannelOptions",
    "exec_start_incoming_migration",
    "exec_start_outgoing_migration",
    "fd_start_incoming_migration",
    "fd_start_outgoing_migration",
    "file_start_incoming_migration",
    "file_start_outgoing_migration",
    "start_incoming",
    "start_outgoing",
    "tcp_start_incoming_migration",
    "tcp_start_outgoing_migration",
    "unix_start_incoming_migration",
    "unix_start_outgoing_migration",
]


def start_incoming(
    address: MigrationAddress,
    *,
    migration: Migration | None = None,
    process: Process | None = None,
    options: ChannelOptions | None = None,
) -> str:
    """Await a source at any address but RDMA's, and process its migration on the worker thread.

    Args:
        address: where.
        migration: owns what is started; becomes the process's current one. None, as in the
            header: the process's own, with what is set for it.
        process: loads the stream from the file; None for `process_incoming_migration`.
        options: limits.

    Returns:
        the URI that a source can connect to.

    Raises:
        UsageError: --allow where nobody has an address; no guest to load into.
        HostError: this host cannot do it.
        LocalProtocolError: another migration is under way.
    """
    options = options or ChannelOptions()
    if options.allow and not isinstance(address, TcpAddress):
        raise UsageError(f"--allow is for addresses of the network, and {address} has none")
    if isinstance(address, RdmaAddress):
        raise UsageError(f"{address} is RDMA's")
    work, load = incoming_engine(migration, process)
    work.become_current()
    cancel = work.cancellation
    match address:
        case TcpAddress() | UnixAddress():
            guard = client_guard(work, options.allow)
            listener = SocketListener(address, cancel, guard)
            ready = str(listener.address)
            if guard is None and isinstance(listener.address, TcpAddress):
                warn_if_open(work, listener.address.host)

            def open_link() -> Link:
                with listener:
                    return listener.accept(Deadline.after(options.accept_seconds), options.limits)

        case _:
            link = _reading(address, work, options)
            ready = str(address)

            def open_link() -> Link:
                return link

    work.emit(Listening(ready))
    work.run(lambda: _incoming(work, open_link, load), "rdma-mig-incoming")
    return ready


def _reading(address: MigrationAddress, migration: Migration, options: ChannelOptions) -> Link:
    cancel, limits = migration.cancellation, options.limits()
    match address:
        case FdAddress():
            return inherited_link(address, reading=True, cancel=cancel, limits=limits)
        case ExecAddress():
            return ProcessLink(address.command, reading=True, cancel=cancel, limits=limits)
        case FileAddress():
            return FileReader(address, cancel, limits)
    raise UsageError(f"{address} cannot be read")


def _incoming(migration: Migration, open_link: Callable[[], Link], process: Process) -> None:
    migration.state.step = "waiting for a source"
    migration.state.owner = AT_SOURCE
    link = open_link()
    migration.advance(MigrationStatus.ACTIVE)
    run_engine(migration, PlainIncoming(link), process, other="source", tell=[_connected(link)])


def _connected(link: Link) -> Connected:
    return Connected(
        peer=link.peer,
        local=link.local,
        device=None,
        port=None,
        transport=link.kind,
        gid_index=None,
        gid=None,
        mtu=None,
        pin_all=False,
        connections=1,
    )


def start_outgoing(
    state: Migration | MigrationState,
    address: MigrationAddress,
    *,
    save: Save | None = None,
    options: ChannelOptions | None = None,
) -> None:
    """Connect to any address but RDMA's, and save to it on the worker thread.

    Args:
        state: the migration that owns what is started; becomes the process's current one. With
            the header's `MigrationState`, one is made with what is set there.
        address: where.
        save: writes the stream to the file; None for `migrate_fd_connect`.
        options: limits.

    Raises:
        UsageError: a return path where there can be none; no guest; block devices were asked for.
        HostError: this host cannot do it.
        LocalProtocolError: another migration is under way.
        MigrationError: migrations are blocked (`migrate_add_blocker`).
    """
    options = options or ChannelOptions()
    if options.return_path and isinstance(address, (ExecAddress, FileAddress)):
        raise UsageError(f"{address} has no way back: leave --return-path out")
    if isinstance(address, RdmaAddress):
        raise UsageError(f"{address} is RDMA's")
    migration, engine = outgoing_engine(state, save, options.total_seconds)
    migration.become_current()
    cancel = migration.cancellation
    match address:
        case TcpAddress() | UnixAddress():

            def open_link() -> Link:
                return connect(address, cancel, options.limits)

        case FdAddress():
            link = inherited_link(address, reading=False, cancel=cancel, limits=options.limits())
            if options.return_path and not link.two_way:
                link.close()
                raise UsageError(f"{address} has no way back: leave --return-path out")

            def open_link() -> Link:
                return link

        case ExecAddress():

            def open_link() -> Link:
                return ProcessLink(
                    address.command, reading=False, cancel=cancel, limits=options.limits()
                )

        case FileAddress():
            # Here, so that what cannot be written is said at once.
            writer = FileWriter(address, cancel, options.limits())

            def open_link() -> Link:
                return writer

    def work() -> None:
        migration.state.step = "connecting"
        try:
            link = open_link()
        except MigrationError as error:
            complete_failure(error, str(address), "destination")
            raise
        wanted = link.two_way if options.return_path is None else options.return_path
        transport = PlainOutgoing(link, return_path=wanted, ping=RETURN_PATH_PING)
        run_engine(migration, transport, engine, other="destination", tell=[_connected(link)])

    migration.run(work, "rdma-mig-outgoing")


# ---- the header's names ----


def _incoming_name(scheme: str, what: str) -> Callable[..., str]:
    def start(
        address: str,
        *,
        migration: Migration | None = None,
        process: Process | None = None,
        options: ChannelOptions | None = None,
    ) -> str:
        return start_incoming(
            parse_uri(f"{scheme}:{address}", listening=True),
            migration=migration,
            process=process,
            options=options,
        )

    start.__name__ = start.__qualname__ = f"{scheme}_start_incoming_migration"
    start.__doc__ = f"""Process a migration that comes {what}; see `start_incoming`."""
    return start


def _outgoing_name(scheme: str, what: str) -> Callable[..., None]:
    def start(
        state: Migration | MigrationState,
        address: str,
        *,
        save: Save | None = None,
        options: ChannelOptions | None = None,
    ) -> None:
        start_outgoing(
            state, parse_uri(f"{scheme}:{address}", listening=False), save=save, options=options
        )

    start.__name__ = start.__qualname__ = f"{scheme}_start_outgoing_migration"
    start.__doc__ = f"""Save a migration {what}; see `start_outgoing`."""
    return start


tcp_start_incoming_migration = _incoming_name("tcp", "over TCP: ``HOST:PORT`` to listen at")
unix_start_incoming_migration = _incoming_name("unix", "over a socket: ``PATH`` to listen at")
fd_start_incoming_migration = _incoming_name("fd", "from a descriptor: its number")
exec_start_incoming_migration = _incoming_name("exec", "from the output of a shell command")
file_start_incoming_migration = _incoming_name("file", "from a file: ``PATH[,offset=BYTES]``")
tcp_start_outgoing_migration = _outgoing_name("tcp", "over TCP, to ``HOST:PORT``")
unix_start_outgoing_migration = _outgoing_name("unix", "over the socket at ``PATH``")
fd_start_outgoing_migration = _outgoing_name("fd", "to a descriptor, a number")
exec_start_outgoing_migration = _outgoing_name("exec", "to the input of a shell command")
file_start_outgoing_migration = _outgoing_name("file", "to a file: ``PATH[,offset=BYTES]``")
