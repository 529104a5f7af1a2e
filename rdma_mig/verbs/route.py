# SPDX-License-Identifier: Apache-2.0
"""Over which device, port and GID a connection runs, and what a device's GIDs are.

Read from sysfs and from rdma_cm's own record of the connection.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdma_mig.verbs import addresses
from rdma_mig.verbs.loading import load

__all__ = ["Gid", "Route", "active_port", "gids", "is_ethernet", "is_iwarp", "route_of"]

_CLASS = Path("/sys/class/infiniband")
_EMPTY = bytes(16)
_RNIC = "4"  # the node type of iWARP adapters (rdma_netlink.h and sysfs: "4: RNIC")


@dataclass(frozen=True, slots=True)
class Gid:
    """One entry of a port's GID table.

    Attributes:
        index: its place in the table.
        raw: its 16 bytes.
        transport: "RoCE v2", "RoCE v1" or "InfiniBand".
        interface: the network interface that it belongs to; empty where it belongs to none.
    """

    index: int
    raw: bytes
    transport: str
    interface: str = ""

    @property
    def address(self) -> str:
        """The IP address that it stands for; empty where it stands for none.

        Only RoCE v2 is IP on the wire. A link-local address comes with its interface.
        """
        if self.transport != "RoCE v2":
            return ""
        whole = ipaddress.IPv6Address(self.raw)
        if whole.ipv4_mapped is not None:
            return str(whole.ipv4_mapped)
        return f"{whole}%{self.interface}" if whole.is_link_local else str(whole)

    def __str__(self) -> str:
        """Index, address and transport, for messages."""
        return f"{self.index}: {self.address or _text(self.raw)} ({self.transport})"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a connection runs.

    Attributes:
        local, peer: HOST:PORT of both ends.
        device: name of this end's verbs device.
        port: its port, from 1.
        transport: "RoCE v2", "RoCE v1", "InfiniBand" or "iWARP".
        gid_index, gid: this end's GID, as an IPv6 address; None on iWARP, whose connections are of
            TCP and have none, and on InfiniBand within one subnet.
        mtu: bytes of RAM that one packet carries at most; None on iWARP, where TCP decides.
    """

    local: str
    peer: str
    device: str
    port: int
    transport: str
    gid_index: int | None
    gid: str | None
    mtu: int | None


def _text(gid: bytes) -> str:
    """A GID as IPv6 addresses are written, an IPv4 address in it in its own form."""
    return socket.inet_ntop(socket.AF_INET6, gid)


def _read(device: str, *path: str) -> str:
    try:
        return _CLASS.joinpath(device, *path).read_text().strip()
    except OSError:
        return ""


def is_iwarp(device: str) -> bool:
    """Whether the device speaks iWARP: RDMA over TCP, with other rules than InfiniBand's."""
    return _read(device, "node_type").startswith(f"{_RNIC}:")


def _ports(device: str) -> list[int]:
    try:
        return sorted(int(entry.name) for entry in _CLASS.joinpath(device, "ports").iterdir())
    except (OSError, ValueError):
        return []


def active_port(device: str) -> int:
    """The first port that is up; 1 where none is."""
    for port in _ports(device):
        if "ACTIVE" in _read(device, "ports", str(port), "state"):
            return port
    return 1


def is_ethernet(device: str) -> bool:
    """Whether its port is an Ethernet one: RoCE or iWARP."""
    return _read(device, "ports", str(active_port(device)), "link_layer") == "Ethernet"


def _transport(device: str, port: int, index: int) -> str:
    if is_iwarp(device):
        return "iWARP"
    if _read(device, "ports", str(port), "link_layer") != "Ethernet":
        return "InfiniBand"
    kind = _read(device, "ports", str(port), "gid_attrs", "types", str(index))
    return "RoCE v2" if kind == "RoCE v2" else "RoCE v1"


def gids(device: str, port: int) -> tuple[int, list[Gid]]:
    """Return how long a port's GID table is, and its entries that are not empty."""
    table = _CLASS / device / "ports" / str(port) / "gids"
    try:
        indices = sorted(int(entry.name) for entry in table.iterdir())
    except (OSError, ValueError):
        return 0, []
    found = []
    for index in indices:
        try:
            raw = ipaddress.IPv6Address(_read(device, "ports", str(port), "gids", str(index)))
        except ValueError:
            continue
        if raw.packed != _EMPTY:
            interface = _read(device, "ports", str(port), "gid_attrs", "ndevs", str(index))
            transport = _transport(device, port, index)
            found.append(Gid(index, raw.packed, transport, interface))
    return len(indices), found


def route_of(cmid: Any, path: tuple[int | None, int | None]) -> Route:
    """Say where a connection runs, once both ends have agreed on it.

    Args:
        cmid: of the connection.
        path: what path_attributes() said when the agreement came about: the kernel does not know it
            any more when the peer has left, which may be at once.
    """
    verbs = load()
    device, port = verbs.device_name(cmid), verbs.port_number(cmid)
    index, mtu = path
    gid = None if index is None else _text(verbs.source_gid(cmid))
    return Route(
        local=addresses.describe(verbs.local_address(cmid)),
        peer=addresses.describe(verbs.peer_address(cmid)),
        device=device,
        port=port,
        transport=_transport(device, port, index or 0),
        gid_index=index,
        gid=gid,
        mtu=mtu,
    )
