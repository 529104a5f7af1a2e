# SPDX-License-Identifier: Apache-2.0
"""Options that the migrating commands share."""

from __future__ import annotations

import argparse
import ipaddress
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdma_mig.migration.rdma import RdmaOptions

__all__ = [
    "add_common",
    "connections",
    "host_port",
    "index",
    "network",
    "rdma_options",
    "seconds",
    "size",
]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def network(text: str) -> str:
    """Parse an address or a network, ADDR or ADDR/LEN."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no address and no network such as 192.0.2.0/24"
        ) from None


def size(text: str) -> int:
    """Parse a number of bytes: an integer, and K, M, G or T for powers of 1024."""
    found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(iB|B)?", text, re.IGNORECASE)
    value = int(found[1]) * _UNITS[found[2].upper()] if found else 0
    if not 0 < value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 16G")
    return value


def seconds(text: str) -> float:
    """Parse a number of seconds, positive and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def host_port(text: str) -> tuple[str, int]:
    """Parse PORT, or ADDRESS:PORT with an IPv6 address in brackets; loopback by default."""
    host, colon, port = text.rpartition(":")
    host = host if colon else "127.0.0.1"
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not (host and port.isascii() and port.isdigit() and int(port[:6]) < 65536):
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is no [ADDRESS:]PORT such as 9470")
    return host, int(port)


def index(text: str) -> int:
    """Parse an index into a table: a number from 0."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is no index: it is a number from 0")
    return int(text)


def connections(text: str) -> int:
    """Parse how many connections may share the writes: 1 to 16."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= 16):
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is no number from 1 to 16")
    return int(text)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a device, limits and output options."""
    device = parser.add_argument_group("device, where this host has several")
    device.add_argument(
        "--rdma-device",
        metavar="NAME",
        help="connect over this device, and over no other (rdma link show names them)",
    )
    device.add_argument(
        "--gid-index",
        type=index,
        metavar="N",
        help="connect with this GID of the device, that is, with this of its IP addresses",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="limit on the migration from its connection on; none by default",
    )
    limits.add_argument(
        "--stall-timeout",
        type=seconds,
        metavar="SECONDS",
        help="give up on a peer that is alive and says nothing for so long; never by default",
    )
    output = parser.add_argument_group("output")
    output.add_argument("-j", "--json", action="store_true", help="print events, one JSON a line")
    output.add_argument(
        "--trace",
        metavar="FILE",
        help="write what happens to this file: control messages, registrations, the commit point",
    )
    output.add_argument(
        "--metrics-file",
        type=Path,
        metavar="FILE",
        help="keep figures for Prometheus in this file, such as node_exporter's textfile collector "
        "reads (a name that ends in .prom); needs prometheus_client, the extra 'metrics'",
    )
    output.add_argument(
        "--metrics-port",
        type=host_port,
        metavar="[ADDRESS:]PORT",
        help="serve them over HTTP while it runs, on loopback unless an address is given",
    )
    output.add_argument("-q", "--quiet", action="store_true", help="no progress and no summary")
    output.add_argument("-v", "--verbose", action="store_true", help="say more of the connection")


def rdma_options(args: argparse.Namespace, *, listening: bool) -> RdmaOptions | None:
    """Check the URI, and return what was said for RDMA; None for another transport.

    Raises:
        UsageError: the URI cannot be used, or something was said for RDMA that it is not.
    """
    from rdma_mig.errors import UsageError
    from rdma_mig.wire.uri import RdmaAddress, parse_uri

    pin_all = getattr(args, "rdma_pin_all", False)
    assume_zero = getattr(args, "assume_zero_destination", False)
    connections = getattr(args, "connections", 1)
    if isinstance(parse_uri(args.uri, listening=listening), RdmaAddress):
        from rdma_mig.migration.rdma import RdmaOptions
        from rdma_mig.verbs.endpoint import EndpointOptions

        return RdmaOptions(
            pin_all=pin_all,
            assume_zero=assume_zero,
            connections=connections,
            endpoint=EndpointOptions(device=args.rdma_device, gid_index=args.gid_index),
        )
    given = {
        "--rdma-pin-all": pin_all,
        "--assume-zero-destination": assume_zero,
        "--connections": connections != 1,
        "--rdma-device": args.rdma_device is not None,
        "--gid-index": args.gid_index is not None,
    }
    names = [name for name, value in given.items() if value]
    if names:
        raise UsageError(
            f"{', '.join(names)}: {args.uri[:100]!r} is no rdma: URI", remedy="leave it out"
        )
    return None
