# SPDX-License-Identifier: Apache-2.0
"""What a stream runs over where no RDMA is: a descriptor, waited for with limits.

Reads and writes are large and do not block, so that the wait before them is the only one.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from rdma_mig.closing import Closing
from rdma_mig.errors import (
    HostError,
    LocalProtocolError,
    MigrationCancelled,
    MigrationTimeout,
    PeerGone,
)
from rdma_mig.waits import Cancel, Deadline, TransportLimits
from rdma_mig.wire.uri import FdAddress
from rdma_mig.words import place

__all__ = ["READ_SIZE", "DescriptorLink", "Link", "SocketLink", "inherited_link", "wait_for"]

READ_SIZE = 1 << 20
"""Most bytes that are read at a time."""

_TIMEOUT_REMEDY = (
    "see what the other end does, or allow more with --timeout or --stall-timeout, whichever was "
    "given"
)


def wait_for(
    fd: int, events: int, cancel: Cancel, deadline: Deadline, doing: str, peer: str
) -> None:
    """Wait until a descriptor is ready: ``events`` of poll(2), or its end.

    Args:
        fd: the descriptor.
        events: select.POLLIN or select.POLLOUT.
        cancel: ends the wait.
        deadline: ends it as well.
        doing: what is awaited, for the message.
        peer: from whom.

    Raises:
        MigrationCancelled, MigrationTimeout: it was ended.
    """
    poll = select.poll()
    poll.register(fd, events)
    poll.register(cancel.fileno(), select.POLLIN)
    while True:
        left = deadline.remaining
        ready = poll.poll(None if left is None else math.ceil(left * 1000))
        if cancel.requested:
            raise MigrationCancelled(f"cancelled while waiting for {doing} ({peer})")
        if any(number == fd for number, _ in ready):
            return
        if deadline.passed:
            raise MigrationTimeout(
                f"nothing came from {peer} within {deadline.seconds:g} s; awaited was {doing}",
                remedy=_TIMEOUT_REMEDY,
            )


class Link(Closing):
    """One end of a byte stream; the base of what it may run over.

    Args:
        cancel: ends every wait.
        limits: on them.
        peer: who is at the other end, for messages.

    Attributes:
        two_way: whether a return path can run the other way.
        kind: the scheme of its URI.
        local: this end's name, where it has one.
    """

    two_way = False
    kind = ""
    local = ""

    def __init__(self, cancel: Cancel, limits: TransportLimits, peer: str) -> None:
        self.cancel = cancel
        self.limits = limits
        self.peer = peer

    def read(self, doing: str) -> bytes:
        """Wait for bytes, at most READ_SIZE; empty at the end.

        Raises:
            PeerGone, MigrationTimeout, MigrationCancelled: there are none.
        """
        raise LocalProtocolError(f"{self.peer} is written, not read")

    def write(self, data: bytes | memoryview, doing: str) -> None:
        """Hand over all of ``data``.

        Raises:
            PeerGone, MigrationTimeout, MigrationCancelled: it could not be.
        """
        raise LocalProtocolError(f"{self.peer} is read, not written")

    def finish(self) -> str:
        """All was read or written: make sure of it; return in words what is known by that.

        Raises:
            MigrationError: the other end, or the disk, has not got it.
        """
        return ""

    def abort(self) -> None:
        """It has failed: leave nothing half done; then close."""
        self.close()

    @contextmanager
    def silence_limited(self, seconds: float) -> Iterator[None]:
        """Let the other end be silent for so long at most, within this block."""
        before = self.limits.stall
        self.limits.stall = min(seconds, before or seconds)
        try:
            yield
        finally:
            self.limits.stall = before


class DescriptorLink(Link):
    """A pipe, a terminal or a file, one way, which is closed with this.

    Args:
        fd: taken over.
        cancel, limits, peer: as for `Link`.
    """

    def __init__(self, fd: int, cancel: Cancel, limits: TransportLimits, peer: str) -> None:
        super().__init__(cancel, limits, peer)
        self._fd = fd

    def read(self, doing: str) -> bytes:
        """Wait for bytes; empty at the end."""
        while True:
            wait_for(
                self._fd, select.POLLIN, self.cancel, self.limits.next_wait(), doing, self.peer
            )
            try:
                return self._receive()
            except BlockingIOError:
                continue
            except OSError as error:
                raise PeerGone(
                    f"{self.peer} broke off ({error.strerror}); awaited was {doing}"
                ) from (error)

    def write(self, data: bytes | memoryview, doing: str) -> None:
        """Hand over all of ``data``."""
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                wait_for(
                    self._fd,
                    select.POLLOUT,
                    self.cancel,
                    self.limits.next_wait(),
                    f"room for {doing}",
                    self.peer,
                )
                try:
                    with view[at : at + READ_SIZE] as piece:
                        at += self._send(piece)
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise self._cannot_write(error, doing) from error

    def _receive(self) -> bytes:
        return os.read(self._fd, READ_SIZE)

    def _send(self, piece: memoryview) -> int:
        return os.write(self._fd, piece)

    def _cannot_write(self, error: OSError, doing: str) -> Exception:
        if error.errno in (errno.EPIPE, errno.ECONNRESET):
            return PeerGone(f"{self.peer} takes no more ({error.strerror}); it was sent {doing}")
        return HostError(f"{doing} cannot be written to {self.peer}: {error.strerror}")

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class SocketLink(DescriptorLink):
    """A connected stream socket, both ways.

    Args:
        connection: taken over.
        kind: scheme of its URI.
        cancel, limits, peer: as for `Link`.
    """

    two_way = True

    def __init__(
        self,
        connection: socket.socket,
        kind: str,
        cancel: Cancel,
        limits: TransportLimits,
        peer: str,
    ) -> None:
        super().__init__(connection.fileno(), cancel, limits, peer)
        self._socket = connection
        self.kind = kind
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            self.local = place(*connection.getsockname()[:2])
            # A host that is gone is noticed after some 15 s, if nothing is on its way to it.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # The description of an inherited socket may be others' too, so it is left as it is.

    def _receive(self) -> bytes:
        return self._socket.recv(READ_SIZE, socket.MSG_DONTWAIT)

    def _send(self, piece: memoryview) -> int:
        return self._socket.send(piece, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def ended(self) -> bool:
        """Whether the other end has closed already, without waiting and without reading."""
        try:
            return not self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._fd = -1
        self._socket.close()


def inherited_link(
    address: FdAddress, *, reading: bool, cancel: Cancel, limits: TransportLimits
) -> Link:
    """Take over a descriptor that this process was started with: a socket, a pipe or a file.

    Raises:
        HostError: it is not open, or cannot be used in this direction.
    """
    number = address.number
    what = address.peer or f"descriptor {number}"
    try:
        mode = os.fstat(number).st_mode
        if stat.S_ISSOCK(mode):
            return SocketLink(socket.socket(fileno=number), "fd", cancel, limits, what)
        fd = number
        if stat.S_ISFIFO(mode):
            # A description of its own: whoever shares this one shall not find it non-blocking.
            access = os.O_RDONLY if reading else os.O_WRONLY
            fd = os.open(f"/proc/self/fd/{number}", access | os.O_NONBLOCK | os.O_CLOEXEC)
            os.close(number)
        elif not stat.S_ISREG(mode):
            os.set_blocking(number, False)
        link = DescriptorLink(fd, cancel, limits, what)
        link.kind = "fd"
        return link
    except OSError as error:
        raise HostError(
            f"{what} cannot be used: {error.strerror}",
            remedy=f"start this command with it open, such as {'N<' if reading else 'N>'}FILE",
        ) from None
