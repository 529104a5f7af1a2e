# SPDX-License-Identifier: Apache-2.0
"""What this host has of RDMA: libraries, device files, devices, ports, GIDs, limits."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

from rdma_mig.errors import HostError
from rdma_mig.host.findings import Finding, Level
from rdma_mig.memory import chunk_count
from rdma_mig.verbs.host import devices, require_rdma, unusable_devices
from rdma_mig.verbs.loading import load
from rdma_mig.verbs.route import Gid, active_port, gids, is_ethernet, is_iwarp

__all__ = ["access", "adapters", "libraries"]

_CLASS = Path("/sys/class/infiniband")
_LIBRARY = re.compile(r"/(libibverbs|librdmacm)\.so\.1\.(?:\d+\.)?(\d+)\.\d+(?:\.\d+)?$")
# Frames below this carry RDMA packets of less than 4096 bytes: 4096 and 104 of headers at most.
_LARGE_FRAME = 4200
_RAISE_MTU = (
    "larger frames move RAM faster, where all switches allow them: ip link set dev {} mtu 9000"
)


def libraries() -> Iterator[Finding]:
    """Whether pyverbs, libibverbs, librdmacm and our own layer are there and fit each other."""
    try:
        load()
    except HostError as error:
        yield Finding("libraries", Level.BLOCKER, error.message, error.remedy)
        return
    found = sorted({match.groups() for match in _mapped_libraries()})
    names = ", ".join(f"{name} {version}" for name, version in found)
    versions = {version for _name, version in found}
    # Both are built from one rdma-core, and share what is private to it.
    mixed = len(versions) > 1
    yield Finding(
        "libraries",
        Level.WARNING if mixed else Level.OK,
        f"pyverbs loads, with {names or 'libibverbs and librdmacm'}"
        + (": they are of different versions of rdma-core" if mixed else ""),
        "apt-get install --reinstall libibverbs1 librdmacm1 python3-pyverbs" if mixed else "",
    )


def _mapped_libraries() -> Iterator[re.Match[str]]:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.partition("/")[2]
        if path and (match := _LIBRARY.search(f"/{path}")):
            yield match


def access() -> Iterator[Finding]:
    """Whether the device files are there and may be opened by this process."""
    try:
        require_rdma()
    except HostError as error:
        yield Finding("devices", Level.BLOCKER, error.message, error.remedy)
        return
    closed = unusable_devices()
    for why in closed:
        yield Finding("permissions", Level.WARNING, why.message, why.remedy)
    if not closed:
        yield Finding("permissions", Level.OK, "all device files in /dev/infiniband can be opened")


def adapters(device: str | None = None, ram: int | None = None) -> Iterator[Finding]:
    """Look at each device, or at the one that is named.

    Args:
        device: the only one that counts; None for all.
        ram: bytes of the guest that is to migrate; None to tell what there is.
    """
    names = devices()
    if device is not None and device not in names:
        yield Finding(
            "devices",
            Level.BLOCKER,
            f"this host has no RDMA device {device!r}, it has {', '.join(names) or 'none'}",
            "rdma link show",
        )
        return
    states = {name: _port_state(name) for name in names}
    considered = [name for name in names if device in (None, name)]
    usable = [name for name in considered if "ACTIVE" in states[name]]
    for name in considered:
        yield _port(name, states[name], blocker=not usable)
        if "ACTIVE" in states[name]:
            yield from _addresses(name)
            yield from _frames(name)
        yield from _limits(name, ram)


def _read(*path: str) -> str:
    with contextlib.suppress(OSError):
        return _CLASS.joinpath(*path).read_text(encoding="ascii").strip()
    return ""


def _port_state(device: str) -> str:
    return _read(device, "ports", str(active_port(device)), "state").partition(": ")[2]


def _interface(device: str) -> str:
    """The network interface of a RoCE or iWARP device; empty where it has none."""
    _length, found = gids(device, active_port(device))
    return next((gid.interface for gid in found if gid.interface), "")


def _port(device: str, state: str, *, blocker: bool) -> Finding:
    port = active_port(device)
    rate = _read(device, "ports", str(port), "rate")
    kind = _read(device, "ports", str(port), "link_layer") or "unknown link"
    kind = "iWARP" if is_iwarp(device) else "RoCE" if kind == "Ethernet" else kind
    if "ACTIVE" in state:
        return Finding("port", Level.OK, f"{device} port {port} is active ({kind}, {rate})")
    interface = _interface(device)
    return Finding(
        "port",
        Level.BLOCKER if blocker else Level.WARNING,
        f"{device} port {port} is {state or 'in an unknown state'} ({kind})",
        f"ip link set dev {interface} up" if interface else "plug the cable in; rdma link show",
    )


def _addresses(device: str) -> Iterator[Finding]:
    """Which GIDs there are, and which one a connection gets."""
    port = active_port(device)
    _length, found = gids(device, port)
    if is_iwarp(device):
        yield Finding("gid", Level.OK, f"{device} is iWARP: connections are of TCP, without GIDs")
        return
    if not is_ethernet(device):
        yield Finding(
            "gid",
            Level.OK,
            f"{device} is InfiniBand: its GID follows from the address of IP over InfiniBand",
        )
        return
    ipv4 = [gid for gid in found if gid.address and "." in gid.address]
    ipv6 = [gid for gid in found if gid.address and _global(gid.address)]
    interface = _interface(device) or "INTERFACE"
    if ipv4:
        yield Finding(
            "gid",
            Level.OK,
            f"a connection from {ipv4[0].address} uses {_named(device, ipv4[0])}"
            + "".join(f"; from {gid.address} index {gid.index}" for gid in ipv4[1:])
            + ": the kernel takes the GID of the address that a connection comes from",
        )
    else:
        yield Finding(
            "gid",
            Level.WARNING if ipv6 else Level.BLOCKER,
            f"{device} has no RoCE v2 GID of an IPv4 address, which a QEMU up to 10.0 needs",
            f"ip address add 192.0.2.1/24 dev {interface} (an address of yours); the GID can take "
            "seconds to appear",
        )
    yield Finding(
        "ipv6",
        Level.OK,
        f"{device} has {len(ipv6)} global IPv6 addresses; a QEMU up to 10.0 refuses IPv6 on RoCE, "
        "between two rdma-migrate it works",
    )


def _named(device: str, gid: Gid) -> str:
    return f"GID index {gid.index} of {device} ({gid.transport})"


def _global(address: str) -> bool:
    with contextlib.suppress(ValueError):
        parsed = ipaddress.ip_address(address.partition("%")[0])
        return parsed.version == 6 and not parsed.is_link_local
    return False


def _frames(device: str) -> Iterator[Finding]:
    """Bytes of a frame: what fits decides how many packets RAM takes."""
    interface = _interface(device)
    if not interface:
        return
    with contextlib.suppress(OSError, ValueError):
        mtu = int(Path("/sys/class/net", interface, "mtu").read_text(encoding="ascii"))
        yield Finding(
            "mtu",
            Level.OK,
            f"frames of {mtu} bytes on {interface} ({device})",
            _RAISE_MTU.format(interface) if mtu < _LARGE_FRAME else "",
        )


def _limits(device: str, ram: int | None) -> Iterator[Finding]:
    """How much the device can register; nothing where it cannot be opened, which access() tells."""
    try:
        load()
        from pyverbs.device import Context
        from pyverbs.pyverbs_error import PyverbsError
    except (HostError, ImportError):
        return
    try:
        with Context(name=device) as context:
            attributes = context.query_device()
            count, size = attributes.max_mr, attributes.max_mr_size
            try:
                on_demand = bool(context.query_device_ex().odp_caps.general_caps & 1)
            except PyverbsError:
                on_demand = False
    except PyverbsError:
        return
    yield _registration(device, count, size, ram, "yes" if on_demand else "no")


def _registration(device: str, count: int, size: int, ram: int | None, on_demand: str) -> Finding:
    """What follows from how many regions a device takes, and of how many bytes each."""
    told = f"{device} registers up to {count} regions, " + (
        f"each of up to {size >> 20} MiB" if size < 1 << 50 else "of any size"
    )
    if ram is not None and ram > size:
        return Finding(
            "registration",
            Level.WARNING,
            f"{told}: too little for {ram >> 20} MiB in one piece, as rdma-pin-all needs them",
            "leave rdma-pin-all off, or give the guest several memory backends",
        )
    if ram is not None and chunk_count(ram) > count:
        return Finding(
            "registration",
            Level.WARNING,
            f"{told}: too few for the {chunk_count(ram)} chunks of {ram >> 20} MiB, each of which "
            "is one without rdma-pin-all",
            "migrate with rdma-pin-all on (outgoing: --rdma-pin-all)",
        )
    return Finding("registration", Level.OK, f"{told}; on-demand paging: {on_demand}, and not used")
