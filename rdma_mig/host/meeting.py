# SPDX-License-Identifier: Apache-2.0
"""How two of this package's tools meet: over TCP, as those of perftest do, with lines of JSON.

A port that speaks RDMA may be a QEMU's, which does not survive strangers; so the two ends agree
here on everything before they use RDMA.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rdma_mig.channel.link import SocketLink
from rdma_mig.channel.sockets import SocketListener, connect
from rdma_mig.closing import Closing
from rdma_mig.errors import HostError, MigrationTimeout, PeerGone, RemoteProtocolError, UsageError
from rdma_mig.waits import Cancel, Deadline, TransportLimits
from rdma_mig.wire.uri import TcpAddress

__all__ = ["DEFAULT_PORT", "Meeting", "await_other", "host_port", "join"]

DEFAULT_PORT = 18515
"""Where the two ends meet unless told otherwise: the port of perftest's tools."""

_API = 1
_SEND_SECONDS = 10.0
_LINE_MAX = 1 << 20


def host_port(text: str) -> tuple[str, int]:
    """Parse HOST, HOST:PORT, [IPv6] or [IPv6]:PORT.

    Raises:
        UsageError: it is none of them.
    """
    host, port = text, str(DEFAULT_PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if rest else port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise UsageError(f"{text[:64]!r} is no HOST[:PORT]", remedy="such as 192.0.2.1:18515")
    return host, int(port)


class Meeting(Closing):
    """Objects of JSON with the other end, a line each, with limits on length and waiting.

    Args:
        link: closed with this.
        tool: the command at both ends, such as ``doctor``.

    Attributes:
        peer: the other end's HOST:PORT.
        peer_host, local_host: numeric addresses of the two ends.
    """

    def __init__(self, link: SocketLink, tool: str) -> None:
        self.peer = link.peer
        self.peer_host = _host_of(link.peer)
        self.local_host = _host_of(link.local)
        self._link = link
        self._tool = tool
        self._buffer = bytearray()

    def send(self, **value: Any) -> None:
        """Send one.

        Raises:
            PeerGone, MigrationTimeout, MigrationCancelled: it cannot be sent.
        """
        line = json.dumps({"api": _API, **value}).encode() + b"\n"
        with self._link.silence_limited(_SEND_SECONDS):
            self._link.write(line, "what this end found")

    def receive(self, what: str, seconds: float) -> dict[str, Any]:
        """Wait for the next one.

        Raises:
            PeerGone, MigrationTimeout, MigrationCancelled: it does not come.
            RemoteProtocolError: it is none.
        """
        deadline = Deadline.after(seconds)
        while b"\n" not in self._buffer:
            with self._link.silence_limited(max(deadline.remaining or 0.0, 0.001)):
                data = self._link.read(what)
            if not data:
                raise PeerGone(f"{self.peer} closed the connection; awaited was {what}")
            self._buffer += data
            if len(self._buffer) > _LINE_MAX:
                raise RemoteProtocolError(
                    f"{self.peer} sent more than {_LINE_MAX} bytes for {what}"
                )
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or value.get("api") != _API:
            raise RemoteProtocolError(
                f"{self.peer} is no rdma-migrate {self._tool} of this version",
                remedy=f"run the same version of rdma-migrate {self._tool} --serve there",
            )
        return value

    def close(self) -> None:
        """End it. Idempotent."""
        self._link.close()


def _host_of(name: str) -> str:
    return name.rpartition(":")[0].strip("[]")


def join(host: str, port: int, cancel: Cancel, tool: str) -> Meeting:
    """Meet the end that serves.

    Raises:
        HostError: nobody serves there, or the name does not resolve.
        MigrationCancelled: it was cancelled.
    """
    try:
        link = connect(TcpAddress(host, port), cancel, TransportLimits)
    except (PeerGone, MigrationTimeout) as error:
        why = error.message.rpartition(": ")[2]
        raise HostError(
            f"{host}:{port} cannot be reached over TCP: {why}",
            remedy=f"start rdma-migrate {tool} --serve there, and let the port pass in firewalls",
        ) from error
    return Meeting(link, tool)


def await_other(
    host: str, port: int, cancel: Cancel, tool: str, listening: Callable[[str], None]
) -> Meeting:
    """Wait for the end that asks.

    Args:
        host, port: where to listen; port 0 takes a free one.
        cancel: ends the wait.
        tool: the command at both ends.
        listening: told HOST:PORT when the other end can come.

    Raises:
        HostError: this host cannot listen there.
        MigrationCancelled: it was cancelled.
    """
    with SocketListener(TcpAddress(host, port), cancel) as listener:
        listening(str(listener.address).removeprefix("tcp:"))
        link = listener.accept(Deadline.after(None), TransportLimits, "a host that asks")
    return Meeting(link, tool)
