# SPDX-License-Identifier: Apache-2.0
"""Migration URIs with a host and a port: ``rdma:HOST:PORT``, and ``tcp:HOST:PORT``.

Wire: docs/protocol.md, addresses.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import ClassVar, Self

from rdma_mig.errors import UsageError

__all__ = ["HostPort", "RdmaAddress", "TcpAddress"]

_EVERYWHERE = ("0.0.0.0", "::")
# What QEMU's address parser takes behind the port; none of it is used here.
_IGNORED_OPTIONS = frozenset({"ipv4", "ipv6", "to", "keep-alive", "mptcp", "numeric"})


@dataclass(frozen=True, slots=True)
class HostPort:
    """Where to listen or to connect: the base of the addresses, which differ in their scheme.

    Args:
        host: a name or an address; IPv6 without brackets.
        port: 0 to 65535; 0 lets a listener pick one.

    Wire: docs/protocol.md, addresses.
    """

    scheme: ClassVar[str]

    host: str
    port: int

    def __str__(self) -> str:
        """The URI, brackets around IPv6."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}:{host}:{self.port}"

    @classmethod
    def parse(cls, uri: str, *, listening: bool) -> Self:
        """Parse ``SCHEME:HOST:PORT`` or ``SCHEME:[V6]:PORT``.

        A tail such as ``,ipv4=on`` is accepted and ignored, as QEMU does over RDMA.

        Args:
            uri: what the operator wrote.
            listening: whether port 0 is allowed.

        Raises:
            UsageError: with the remedy.
        """
        shown = f"{uri[:100]!r}"
        scheme, colon, rest = uri.partition(":")
        if not colon or scheme != cls.scheme:
            got = f"scheme {scheme[:32]!r}" if colon else "no scheme"
            raise UsageError(
                f"{shown} has {got}, allowed is {cls.scheme}", remedy=_example(cls.scheme)
            )
        address, *options = rest.split(",")
        for option in options:
            if option.partition("=")[0] not in _IGNORED_OPTIONS:
                raise UsageError(
                    f"{shown} has unknown option {option[:32]!r}", remedy="leave it out"
                )
        host, port_text = _split(cls.scheme, shown, address)
        port = _port(cls.scheme, shown, port_text, listening=listening)
        if not host:
            remedy = "to listen everywhere write 0.0.0.0 or [::]" if listening else "name the host"
            raise UsageError(f"{shown} has an empty host", remedy=remedy)
        _check_special(cls.scheme, shown, host, listening=listening)
        return cls(host, port)


class RdmaAddress(HostPort):
    """``rdma:HOST:PORT``."""

    __slots__ = ()
    scheme = "rdma"


class TcpAddress(HostPort):
    """``tcp:HOST:PORT``."""

    __slots__ = ()
    scheme = "tcp"


def _example(scheme: str) -> str:
    return (
        f"write {scheme}:HOST:PORT, for example {scheme}:192.0.2.1:4444 or "
        f"{scheme}:[2001:db8::1]:4444"
    )


def _split(scheme: str, shown: str, address: str) -> tuple[str, str]:
    """Split ``HOST:PORT`` and check the host's form (an empty one is left to the caller)."""
    if address.startswith("["):
        host, bracket, rest = address[1:].partition("]")
        if not bracket:
            raise UsageError(
                f"{shown} lacks the bracket that closes the host", remedy=_example(scheme)
            )
        if host:
            _check_ipv6(scheme, shown, host)
        if not rest.startswith(":"):
            raise UsageError(f"{shown} has no port", remedy=_example(scheme))
        return host, rest[1:]
    host, colon, port = address.rpartition(":")
    if not colon:
        raise UsageError(f"{shown} has no port", remedy=_example(scheme))
    if ":" in host:
        raise UsageError(
            f"{shown} has more than one colon behind the scheme",
            remedy=f"put an IPv6 address in brackets: {scheme}:[2001:db8::1]:4444",
        )
    if not host.isprintable() or any(char in " /@[]\\\"'" for char in host):
        raise UsageError(
            f"{shown} has host {host[:64]!r}, which is no name or address", remedy=_example(scheme)
        )
    return host, port


def _check_ipv6(scheme: str, shown: str, host: str) -> None:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise UsageError(
            f"{shown} has {host[:64]!r} in brackets, which is no IPv6 address",
            remedy=_example(scheme),
        ) from None


def _check_special(scheme: str, shown: str, host: str, *, listening: bool) -> None:
    """Refuse what a resolver takes for every address, but for the two plain ways to write it.

    Listening everywhere is meant or it is an accident: ``*``, ``0`` and ``0x0`` are ways to say it
    that nobody reads so. Connecting there reaches whatever the kernel takes for this host.
    """
    if host in _EVERYWHERE or _is_everywhere(host):
        if not listening:
            raise UsageError(
                f"{shown} has host {host!r}, which is for listening only", remedy="name the host"
            )
        if host not in _EVERYWHERE:
            raise UsageError(
                f"{shown} has host {host!r}, a way to write every address that is not taken",
                remedy="to listen everywhere write 0.0.0.0 or [::]",
            )
    elif ":" in host and (mapped := ipaddress.IPv6Address(host).ipv4_mapped) is not None:
        raise UsageError(
            f"{shown} has an IPv4 address in the form of an IPv6 one, which {scheme.upper()} "
            "does not take",
            remedy=f"write {mapped}",
        )


def _is_everywhere(host: str) -> bool:
    if host == "*":
        return True
    if ":" in host:
        address = ipaddress.IPv6Address(host)
        return int(address.ipv4_mapped or address) == 0
    try:
        # Its numbers may have three bases and the address one to four of them.
        return socket.inet_aton(host) == bytes(4)
    except (OSError, UnicodeError):
        return False


def _port(scheme: str, shown: str, text: str, *, listening: bool) -> int:
    if not text:
        raise UsageError(f"{shown} has no port", remedy=_example(scheme))
    # Five digits at most, so that no long number reaches int().
    port = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else -1
    lowest = 0 if listening else 1
    if not lowest <= port <= 65535:
        raise UsageError(
            f"{shown} has port {text[:32]!r}, allowed are {lowest} to 65535",
            remedy="a port of 0 is for listening only" if port == 0 else _example(scheme),
        )
    return port
