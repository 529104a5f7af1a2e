# SPDX-License-Identifier: Apache-2.0
"""What the commands share that drive QEMUs: signals, options, where the ends meet."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rdma_mig.cli.options import index, seconds, size
from rdma_mig.cli.signals import cancelled_by_signals

if TYPE_CHECKING:
    from rdma_mig.cli.reporting import Reporter
    from rdma_mig.manager.checkpoint import CheckpointOptions
    from rdma_mig.migration.events import MigrationEvent

__all__ = [
    "add_driving",
    "add_meeting",
    "events_of",
    "meeting_uri",
    "sending_options",
    "signalled",
]


def add_meeting(parser: argparse.ArgumentParser) -> None:
    """Add what is said for RDMA, and for the limits of waits."""
    device = parser.add_argument_group("RDMA")
    device.add_argument(
        "--rdma-device",
        metavar="NAME",
        help="connect over this device, and over no other (rdma link show names them)",
    )
    device.add_argument("--gid-index", type=index, metavar="N", help="connect with this GID")


def add_driving(parser: argparse.ArgumentParser, *, sending: bool) -> None:
    """Add what all of them have; ``sending`` for those that have a QEMU send its guest."""
    parser.add_argument(
        "--rdma-pin-all",
        action="store_true",
        help="over RDMA, register all RAM at both ends at the start",
    )
    parser.add_argument(
        "--stop", action="store_true", help="leave the guest stopped; by default it is as it was"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="limit on the migration; none by default"
    )
    if sending:
        limits.add_argument(
            "--max-bandwidth",
            type=size,
            metavar="SIZE",
            help="what QEMU may send in a second, such as 500M; without limit by default",
        )
        limits.add_argument(
            "--downtime-limit",
            type=seconds,
            metavar="SECONDS",
            help="how long the guest may rest at the end, as QEMU plans it; what it is set to by "
            "default",
        )
    output = parser.add_argument_group("output")
    output.add_argument("-j", "--json", action="store_true", help="print events, one JSON a line")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress and no summary")
    output.add_argument("-v", "--verbose", action="store_true", help="say more of the connection")


def events_of(reporter: Reporter) -> Callable[[MigrationEvent], None]:
    """Return what shows events of two threads, and passes over a private socket's number."""
    from rdma_mig.migration.events import Listening

    lock = threading.Lock()

    def show(event: MigrationEvent) -> None:
        if isinstance(event, Listening) and event.uri.startswith("fd:"):
            return
        with lock:
            reporter(event)

    return show


def meeting_uri(uri: str | None, device: str | None, *, listening: bool, remedy: str) -> str:
    """Check where two ends shall meet; empty for a private socket.

    Args:
        uri: what the operator said.
        device: the RDMA device that was asked for.
        listening: whether a port may be left to the system.
        remedy: for an address that cannot be connected to.

    Raises:
        UsageError: no second process can connect there.
    """
    from rdma_mig.errors import UsageError
    from rdma_mig.wire.uri import RdmaAddress, TcpAddress, UnixAddress, parse_uri

    if uri is None:
        return ""
    address = parse_uri(uri, listening=listening)
    if not isinstance(address, (RdmaAddress, TcpAddress, UnixAddress)):
        raise UsageError(f"two ends cannot meet at {uri[:100]!r}", remedy=remedy)
    if isinstance(address, (RdmaAddress, TcpAddress)) and address.host in ("0.0.0.0", "::"):
        raise UsageError(f"nobody can connect to {uri[:100]!r}", remedy=remedy)
    if device is not None and not isinstance(address, RdmaAddress):
        raise UsageError(f"--rdma-device: {uri[:100]!r} is no rdma: URI", remedy="leave it out")
    return uri


def sending_options(args: argparse.Namespace, uri: str) -> CheckpointOptions:
    """Return how a QEMU shall send its guest, as said with the options of `add_driving`."""
    from rdma_mig.manager.checkpoint import CheckpointOptions
    from rdma_mig.manager.qemu import UNLIMITED

    return CheckpointOptions(
        uri=uri,
        pin_all=args.rdma_pin_all,
        stop=args.stop,
        bandwidth=args.max_bandwidth or UNLIMITED,
        downtime_ms=round(args.downtime_limit * 1000) if args.downtime_limit else None,
    )


@contextlib.contextmanager
def signalled(stop: Callable[[], Any], reporter: Reporter) -> Iterator[None]:
    """Have SIGINT and SIGTERM ask for the end, and tell the reporter of a failure."""
    from rdma_mig.errors import MigrationError

    with cancelled_by_signals(stop):
        try:
            yield
        except MigrationError as error:
            reporter.failed(error)
            raise
