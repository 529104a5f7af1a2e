# SPDX-License-Identifier: Apache-2.0
"""Sockets to migrate over: TCP, and those of the file system."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
from collections.abc import Callable

from rdma_mig.channel.link import SocketLink, wait_for
from rdma_mig.closing import Closing
from rdma_mig.errors import HostError, MigrationError, MigrationTimeout, PeerGone
from rdma_mig.resolver import resolve
from rdma_mig.waits import Cancel, Deadline, TransportLimits, nobody_came
from rdma_mig.wire.uri import TcpAddress, UnixAddress
from rdma_mig.words import place

__all__ = ["CONNECT_SECONDS", "SocketListener", "connect"]

CONNECT_SECONDS = 10.0
"""Limit on connecting, over all addresses of a name."""


class SocketListener(Closing):
    """Listens for one source.

    Args:
        address: where; port 0 takes a free one. A socket in the file system that nobody listens
            on any more is replaced.
        cancel: ends the wait.
        guard: says of a client's numeric host why it is not served; None to serve everybody.

    Attributes:
        address: as bound.

    Raises:
        HostError: this host cannot listen there.
    """

    def __init__(
        self,
        address: TcpAddress | UnixAddress,
        cancel: Cancel,
        guard: Callable[[str], str] | None = None,
    ) -> None:
        self._cancel = cancel
        self._guard = guard
        self._path = ""
        self.address: TcpAddress | UnixAddress = address
        if isinstance(address, UnixAddress):
            self._socket = self._listen_unix(address)
        else:
            self._socket = self._listen_tcp(address)
            host, port = self._socket.getsockname()[:2]
            self.address = TcpAddress(str(host), int(port))

    def _listen_tcp(self, address: TcpAddress) -> socket.socket:
        family, *where = resolve(
            address.host, address.port, self._cancel, Deadline.after(CONNECT_SECONDS)
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(tuple(where))
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise _cannot_listen(address, error) from None
        return listener

    def _listen_unix(self, address: UnixAddress) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_dead(address.path)
            before = os.umask(0o177)  # for its owner only, as what arrives
            try:
                listener.bind(address.path)
            finally:
                os.umask(before)
            self._path = address.path
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise _cannot_listen(address, error) from None
        return listener

    def accept(
        self,
        deadline: Deadline,
        limits: Callable[[], TransportLimits],
        awaited: str = "a source",
    ) -> SocketLink:
        """Wait for a client; nobody else is taken afterwards.

        Args:
            deadline: ends the wait.
            limits: makes those of the migration, which begin now.
            awaited: who, for messages.

        Raises:
            MigrationTimeout, MigrationCancelled: none came.
        """
        while True:
            where = str(self.address)
            try:
                wait_for(
                    self._socket.fileno(), select.POLLIN, self._cancel, deadline, awaited, where
                )
            except MigrationTimeout:
                raise nobody_came(awaited, where, deadline) from None
            try:
                connection, client = self._socket.accept()
            except OSError:
                continue  # it went away while it connected
            peer = _name(client) or f"{self.address} (client)"
            if self._guard is not None and isinstance(client, tuple) and self._guard(client[0]):
                connection.close()
                continue
            self.close()
            return SocketLink(connection, self.address.scheme, self._cancel, limits(), peer)

    def close(self) -> None:
        """Stop listening, and remove the socket's file. Idempotent."""
        self._socket.close()
        path, self._path = self._path, ""
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)


def connect(
    address: TcpAddress | UnixAddress, cancel: Cancel, limits: Callable[[], TransportLimits]
) -> SocketLink:
    """Connect to a destination within CONNECT_SECONDS.

    Args:
        address: a name's addresses are tried in their order.
        cancel: ends the wait.
        limits: makes those of the migration, which begin when it is connected.

    Raises:
        PeerGone: nobody listens there.
        HostError: the name does not resolve.
        MigrationTimeout, MigrationCancelled: the wait ended.
    """
    deadline = Deadline.after(CONNECT_SECONDS)
    where: list[tuple[int, str | tuple[str, int]]]
    if isinstance(address, UnixAddress):
        where = [(socket.AF_UNIX, address.path)]
    else:
        found = resolve(address.host, address.port, cancel, deadline)
        where = [(family, (host, port)) for family, host, port in found]
    failure: MigrationError | None = None
    for family, target in where:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            _connect_one(connection, target, cancel, deadline, str(address))
            peer = _name(target) or str(address)
            return SocketLink(connection, address.scheme, cancel, limits(), peer)
        except PeerGone as error:
            failure = failure or error
            connection.close()
        except BaseException:
            connection.close()
            raise
    assert failure is not None
    raise failure


def _connect_one(
    connection: socket.socket,
    where: str | tuple[str, int],
    cancel: Cancel,
    deadline: Deadline,
    name: str,
) -> None:
    connection.setblocking(False)
    code = connection.connect_ex(where)
    if code in (errno.EINPROGRESS, errno.EAGAIN):
        try:
            wait_for(connection.fileno(), select.POLLOUT, cancel, deadline, "the connection", name)
        except MigrationTimeout as error:
            error.remedy = "check the address, the network between the hosts and its firewalls"
            raise
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise PeerGone(
            f"cannot connect to {name}: {os.strerror(code)}",
            remedy="check that the destination listens there",
        )


def _name(where: object) -> str:
    return place(*where[:2]) if isinstance(where, tuple) else ""


def _remove_dead(path: str) -> None:
    """Remove the socket that a listener left which was killed; anything else stays."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def _cannot_listen(address: TcpAddress | UnixAddress, error: OSError) -> HostError:
    remedy = {
        errno.EADDRINUSE: "choose another one"
        + (", or port 0 for a free one; ss -tlnp tells who has it" * (address.scheme == "tcp")),
        errno.EADDRNOTAVAIL: "listen at an address of this host (ip address show)",
        errno.EACCES: "use a port above 1023, or a directory that you may write to",
        errno.ENOENT: "make the directory first",
    }.get(error.errno or 0, "")
    return HostError(f"cannot listen at {address}: {error.strerror}", remedy=remedy)
