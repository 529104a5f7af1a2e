# SPDX-License-Identifier: Apache-2.0
"""Host names and ports to socket addresses in the form that librdmacm takes, and back."""

from __future__ import annotations

import contextlib
import socket
import struct

from rdma_mig.resolver import SockAddr, resolve
from rdma_mig.words import place

__all__ = ["SockAddr", "describe", "host_of", "pack", "resolve", "unpack"]


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
    return place(*address[1:])


def host_of(raw: bytes) -> tuple[int, str] | None:
    """Return family and numeric host of a struct sockaddr, without its port; None for none."""
    address = unpack(raw)
    return address and address[:2]
