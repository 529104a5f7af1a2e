# SPDX-License-Identifier: Apache-2.0
"""Looks host names up, within a limit."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

from rdma_mig.errors import HostError, MigrationTimeout
from rdma_mig.waits import Cancel, Deadline

__all__ = ["SockAddr", "resolve"]

SockAddr = tuple[int, str, int]
"""Address family, numeric address, port."""


def _with_scope(family: int, found: tuple[Any, ...]) -> SockAddr:
    host, port = str(found[0]), int(found[1])
    # A link-local address means nothing without its interface, which comes as a number apart.
    if family == socket.AF_INET6 and found[3] and "%" not in host:
        host += f"%{socket.if_indextoname(found[3])}"
    return family, host, port


def _is_address(host: str) -> bool:
    """Whether it is an IP address and no name; one with a zone may be either."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            socket.inet_pton(family, host)
            return True
    return False


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
    # For a str Python loads the codec for international names, whatever is in it. An address needs
    # none, and no name is in the way of one.
    name = host.encode("ascii") if _is_address(host) else host

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
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
