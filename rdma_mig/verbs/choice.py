# SPDX-License-Identifier: Apache-2.0
"""Which device and GID a connection shall use, where a host has several.

rdma_cm takes neither: device and GID follow from this end's address. So a source binds the address
that belongs to what was asked for and looks where that leads, a destination looks at the address
that it listens at, or at each request that arrives.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from rdma_mig.errors import HostError, UsageError
from rdma_mig.verbs import addresses
from rdma_mig.verbs.host import devices
from rdma_mig.verbs.loading import load
from rdma_mig.verbs.route import Gid, active_port, gids, is_ethernet, is_iwarp

__all__ = ["Choice"]

# A table has room for up to 1024 entries; a message has not.
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Choice:
    """A device of this host, and one of its GIDs; None where anything will do."""

    device: str | None = None
    gid: Gid | None = None

    @classmethod
    def of(cls, device: str | None, gid_index: int | None) -> Choice:
        """Look up what was asked for.

        Args:
            device: name of a verbs device; None for any.
            gid_index: index into the GID table of the device's (first active) port; None for any.

        Raises:
            HostError: this host has no such device, the device no such GID, or the GID is none that
                a connection can have.
            UsageError: an index without a device, and there are several.
        """
        names = devices()
        if device is not None and device not in names:
            raise HostError(
                f"this host has no RDMA device {device[:64]!r}, it has {', '.join(names)}",
                remedy="rdma link show",
            )
        if gid_index is None:
            return cls(device)
        if device is None:
            if len(names) > 1:
                raise UsageError(
                    f"--gid-index {gid_index} is of one device, and this host has several: "
                    f"{', '.join(names)}",
                    remedy="name the device with --rdma-device",
                )
            device = names[0]
        return cls(device, _gid(device, gid_index))

    def __str__(self) -> str:
        """What was asked for, in words."""
        if self.gid is None:
            return str(self.device)
        return f"GID index {self.gid.index} ({self.gid.address}) of {self.device}"

    def address(self) -> str:
        """Return an address to listen at on what was asked for, an IPv4 one if it has one.

        A QEMU up to 10.0 does not take IPv6 on RoCE.

        Raises:
            HostError: it has none.
        """
        assert self.device is not None
        found = [self.gid] if self.gid else gids(self.device, active_port(self.device))[1]
        hosts = sorted(
            (gid.address for gid in found if gid.address), key=lambda host: (":" in host, host)
        )
        if not hosts:
            raise HostError(
                f"{self.device} has no IP address",
                remedy="ip address show; or say where to listen: --uri rdma:ADDR:0",
            )
        return f"[{hosts[0]}]" if ":" in hosts[0] else hosts[0]

    # ---- the source's end ----

    def sources(self, peer: addresses.SockAddr) -> list[addresses.SockAddr | None]:
        """The addresses to connect from, in the order to try them; None leaves it to the kernel.

        Raises:
            HostError: no address of what was asked for is of the peer's family.
        """
        if self.device is None:
            return [None]
        family, host, _port = peer
        if self.gid is not None:
            address = _sockaddr(self.gid)
            if address is None or address[0] != family:
                raise HostError(
                    f"{self} cannot reach {host}, which is IPv{_version(family)}",
                    remedy=f"take another index: {_table(self.device)}",
                )
            return [address]
        # The kernel's own choice first: of several addresses it takes the one that fits.
        found = [_sockaddr(gid) for gid in gids(self.device, active_port(self.device))[1]]
        return [None, *(address for address in found if address and _fits(address, peer))]

    def check_source(self, cmid: Any, peer: str) -> None:
        """Make sure that a resolved address leads over what was asked for.

        Raises:
            HostError: it leads over another device.
        """
        used = load().device_name(cmid)
        if self.device not in (None, used):
            raise HostError(
                f"{peer} is reached over {used}, not over {self.device}",
                remedy="ip route get ADDRESS; rdma link show",
            )

    def check_path(self, cmid: Any, peer: str) -> None:
        """Make sure that the connection's queue pair has the GID that was asked for.

        Raises:
            HostError: rdma_cm chose another, which happens where two have one address.
        """
        if self.gid is None:
            return
        index, _mtu = load().path_attributes(cmid)
        if index != self.gid.index:
            raise HostError(
                f"the connection to {peer} has GID index {index}, not {self}",
                remedy=f"leave --gid-index out, or take {index}",
            )

    # ---- the destination's end ----

    def check_listening(self, cmid: Any, host: str) -> None:
        """Make sure that the address which a listener is bound to belongs to what was asked for.

        Raises:
            HostError: it belongs to another device or GID.
        """
        verbs = load()
        used = verbs.device_name(cmid)
        if self.device is None or not used:
            return  # every address, or the loopback one: each request tells
        bound = addresses.unpack(verbs.local_address(cmid))
        asked = None if self.gid is None else _sockaddr(self.gid)
        if used != self.device:
            raise HostError(
                f"{host} is an address of {used}, not of {self.device}",
                remedy=f"listen at an address of {self.device}, or at 0.0.0.0 or [::]: "
                f"{_table(self.device)}",
            )
        if asked is not None and (bound is None or bound[:2] != asked[:2]):
            raise HostError(
                f"{host} is not the address of {self}",
                remedy=f"listen at {asked[1]}, or at 0.0.0.0 or [::]",
            )

    def why_not(self, request: Any) -> str:
        """Say why a connection request is not taken; empty where it is."""
        if self.device is None:
            return ""
        verbs = load()
        if verbs.device_name(request) != self.device:
            return f"connections are taken over device {self.device} only"
        if self.gid is not None and verbs.path_attributes(request)[0] != self.gid.index:
            return f"connections are taken at {self.gid.address} only"
        return ""


def _version(family: int) -> int:
    return 6 if family == socket.AF_INET6 else 4


def _sockaddr(gid: Gid) -> addresses.SockAddr | None:
    """The address to bind for a GID; None where it stands for no IP address."""
    if not gid.address:
        return None
    family = socket.AF_INET6 if ":" in gid.address else socket.AF_INET
    return int(family), gid.address, 0


def _fits(address: addresses.SockAddr, peer: addresses.SockAddr) -> bool:
    """Whether it is worth trying to reach the peer from there: scopes do not mix."""
    return address[0] == peer[0] and ("%" in address[1]) == ("%" in peer[1])


def _table(device: str) -> str:
    """What a device has of GIDs."""
    _length, found = gids(device, active_port(device))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{device} has {', '.join(map(str, found[:_SHOWN])) or 'none'}{more}"


def _gid(device: str, index: int) -> Gid:
    length, found = gids(device, active_port(device))
    if is_iwarp(device):
        raise HostError(
            f"{device} is an iWARP device, and iWARP has no GIDs to choose from",
            remedy="leave --gid-index out",
        )
    if not 0 <= index < length:
        raise HostError(
            f"{device} has no GID index {index}, allowed are 0 to {length - 1}",
            remedy=_table(device),
        )
    gid = next((entry for entry in found if entry.index == index), None)
    if gid is None:
        raise HostError(f"GID index {index} of {device} is empty", remedy=_table(device))
    if not is_ethernet(device):
        raise HostError(
            f"{device} is an InfiniBand device, where the address decides on the GID",
            remedy="leave --gid-index out",
        )
    if not gid.address:
        raise HostError(
            f"GID index {index} of {device} is of {gid.transport}, which is not IP on the wire",
            remedy=f"take one of RoCE v2: {_table(device)}",
        )
    return gid
