# SPDX-License-Identifier: Apache-2.0
"""Host names and ports to socket addresses in the form that librdmacm takes, and back."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Any

from rdma_mig.errors import HostError, MigrationTimeout
from rdma_mig.waits import Cancel, Deadline

__all__ = ["describe", "host_of", "pack", "resolve", "unpack"]

SockAddr = tuple[int, str, int]
"""Address family, numeric address, port."""


def pack(address: SockAddr) -> bytes:
    """Return struct sockaddr_in or sockaddr_in6 (Linux layout) of a numeric address."""
    family, host, port = address
    if family == socket.AF_INET:
        return (
            struct.pack("=H", family) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)
        )
    name, _, scope = host.partition("%")
    index = int(scope) if scope.isdigit() else socket.if_nametoindex(scope) if scope else 0
    return (
        struct.pack("=H", family)
        + struct.pack(">HI", port, 0)
        + socket.inet_pton(socket.AF_INET6, name)
        + struct.pack("=I", index)
    )


def unpack(raw: bytes) -> SockAddr | None:
    """Return what a struct sockaddr says; None for an empty one."""
    if len(raw) < 16:
        return None
    (family,) = struct.unpack_from("=H", raw)
    (port,) = struct.unpack_from(">H", raw, 2)
    if family == socket.AF_INET:
        return family, socket.inet_ntoa(raw[4:8]), port
    name = socket.inet_ntop(socket.AF_INET6, raw[8:24])
    (index,) = struct.unpack_from("=I", raw, 24) if len(raw) >= 28 else (0,)
    if index:
        # An interface that has gone meanwhile has no name; its number is a scope as well.
        scope = str(index)
        with contextlib.suppress(OSError):
            scope = socket.if_indextoname(index)
        name = f"{name}%{scope}"
    return family, name, port


def describe(raw: bytes) -> str:
    """Return HOST:PORT or [HOST]:PORT of a struct sockaddr, for messages."""
    address = unpack(raw)
    if address is None:
        return "an unknown address"
    family, host, port = address
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


def host_of(raw: bytes) -> tuple[int, str] | None:
    """Return family and numeric host of a struct sockaddr, without its port; None for none."""
    address = unpack(raw)
    return address and address[:2]


def _with_scope(family: int, found: tuple[Any, ...]) -> SockAddr:
    host, port = str(found[0]), int(found[1])
    # A link-local address means nothing without its interface, which comes as a number apart.
    if family == socket.AF_INET6 and found[3] and "%" not in host:
        host += f"%{socket.if_indextoname(found[3])}"
    return family, host, port


def resolve(host: str, port: int, cancel: Cancel, deadline: Deadline) -> list[SockAddr]:
    """Look a name up.

    The resolver of the C library takes neither a limit nor a cancellation, so it runs in a thread
    of its own, which is left behind when the caller cannot wait for it.

    Raises:
        HostError: the name does not resolve, or resolves to every address of a host.
        MigrationTimeout: it did not within the deadline.
        MigrationCancelled: it was cancelled.
    """
    outcome: list[list[SockAddr] | OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            outcome.append([_with_scope(int(f), a) for f, _, _, _, a in found])
        except (OSError, UnicodeError) as error:
            outcome.append(error)

    worker = threading.Thread(target=look_up, name="rdma-mig-resolver", daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(0.05)
        cancel.check(f"looking up {host}")
        if deadline.passed and not outcome:
            raise MigrationTimeout(
                f"the name {host} was not resolved within {deadline.seconds:.0f} s",
                remedy="check the resolver, or give a numeric address",
            )
    result = outcome[0]
    if isinstance(result, UnicodeError):
        raise HostError(
            f"{host[:64]!r} is no host name: a part of it is empty or longer than 63 characters",
            remedy="check the name, or give a numeric address",
        )
    if isinstance(result, OSError):
        raise HostError(
            f"the name {host} does not resolve: {result.strerror or result}",
            remedy=f"check it with: getent hosts {host}",
        )
    for _family, address, _port in result:
        # Only what was written as such listens everywhere, and a host is none of it.
        if address in ("0.0.0.0", "::") and host != address:
            raise HostError(
                f"the name {host} resolves to {address}, which is no host's address",
                remedy=f"check it with: getent ahosts {host}; to listen everywhere write 0.0.0.0 "
                "or [::]",
            )
    # The resolver of the C library answers once for each protocol that it knows.
    return list(dict.fromkeys(result))
