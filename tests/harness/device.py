# SPDX-License-Identifier: Apache-2.0
"""Which address reaches this host's verbs device, found in sysfs and nowhere else."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
from pathlib import Path

from harness.qemu import HarnessError

_DEVICES = Path("/sys/class/infiniband")


def device_address(device: str | None = None) -> tuple[str, str]:
    """The verbs device to test with, and an IPv4 address of it.

    IPv4, because QEMU up to 10.0 refuses IPv6 over Ethernet devices.

    Args:
        device: its name; None for the one that RDMA_MIG_DEVICE names, or else the first one.

    Raises:
        HarnessError: when there is no device, or it has no address.
    """
    present = sorted(path.name for path in _DEVICES.iterdir()) if _DEVICES.is_dir() else []
    wanted = device or os.environ.get("RDMA_MIG_DEVICE") or (present[0] if present else "")
    if wanted not in present:
        raise HarnessError(
            f"no verbs device {wanted or 'at all'} on this host (present: {present or 'none'})"
        )
    for address in _gid_addresses(wanted) + _interface_addresses(wanted):
        return wanted, address
    raise HarnessError(
        f"verbs device {wanted} has no IPv4 address: give one to its network interface "
        "(ip addr add ADDRESS/LENGTH dev INTERFACE)"
    )


def _gid_addresses(device: str) -> list[str]:
    """IPv4 addresses among the GIDs: RoCE devices have one for each of the interface's."""
    addresses = []
    for path in sorted(_DEVICES.joinpath(device).glob("ports/*/gids/*")):
        try:
            mapped = ipaddress.IPv6Address(path.read_text().strip()).ipv4_mapped
        except (OSError, ValueError):
            continue  # an empty slot
        if mapped:
            addresses.append(str(mapped))
    return addresses


def _interface_addresses(device: str) -> list[str]:
    """IPv4 addresses of the device's network interfaces: InfiniBand and iWARP."""
    interfaces = {path.name for path in _DEVICES.joinpath(device).glob("device/net/*")}
    listed = json.loads(
        subprocess.run(
            ["ip", "-json", "-4", "addr"], check=True, capture_output=True, timeout=30
        ).stdout
        or "[]"
    )
    return [
        info["local"]
        for entry in listed
        if entry.get("ifname") in interfaces
        for info in entry.get("addr_info", [])
    ]
