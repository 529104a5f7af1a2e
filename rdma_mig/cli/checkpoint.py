# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate checkpoint``: have a running QEMU's machine in a snapshot."""

from __future__ import annotations

import argparse
import socket
from typing import TYPE_CHECKING, Any

from rdma_mig.cli.driving import (
    add_driving,
    add_meeting,
    events_of,
    meeting_uri,
    sending_options,
    signalled,
)

if TYPE_CHECKING:
    from rdma_mig.manager.qemu import Qemu
    from rdma_mig.migration.channels import ChannelOptions
    from rdma_mig.migration.receive import SnapshotDestination
    from rdma_mig.migration.state import Migration

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Have a QEMU migrate to this process, over a private socket or over RDMA, and keep the machine as a
snapshot directory. When it is whole the guest runs on, or stays stopped with --stop. QEMU's
capabilities and parameters are set for it, and set back. Whenever it fails or is cancelled, the
guest goes on as before, and nothing is left on disk.

How the QEMU was started is kept in the snapshot, where that can be read (command.json); restore and
inspect show it.
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command to an argparse sub-parsers object."""
    parser = commands.add_parser(
        "checkpoint",
        help="have a running QEMU's machine in a snapshot directory, by QMP",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="snapshot directory to make")
    parser.add_argument("--qmp", required=True, metavar="SOCKET", help="QMP socket of the QEMU")
    parser.add_argument(
        "--uri",
        metavar="URI",
        help="where to await the QEMU: rdma:ADDR:0, tcp:ADDR:0 or unix:PATH; by default a socket "
        "that it is given, or with --rdma-device an address of that device",
    )
    parser.add_argument(
        "--no-record-command",
        dest="record_command",
        action="store_false",
        help="do not keep QEMU's command line in the snapshot",
    )
    add_meeting(parser)
    add_driving(parser, sending=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make a checkpoint.

    Raises:
        MigrationError: it failed; the exit status is the error's.
    """
    from rdma_mig.cli.reporting import Reporter
    from rdma_mig.manager.checkpoint import checkpoint
    from rdma_mig.manager.monitor import Monitor
    from rdma_mig.manager.qemu import Qemu
    from rdma_mig.migration.channels import ChannelOptions
    from rdma_mig.migration.receive import SnapshotDestination
    from rdma_mig.migration.state import Migration
    from rdma_mig.waits import Cancel

    uri = meeting_uri(
        args.uri,
        args.rdma_device,
        listening=True,
        remedy="say rdma:ADDR:0, tcp:ADDR:0 or unix:PATH, with an address of this host",
    )
    if not uri and args.rdma_device is not None:
        uri = f"rdma:{_device_address(args.rdma_device, args.gid_index)}:0"
    options = sending_options(args, uri)
    reporter = Reporter(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    show = events_of(reporter)
    with (
        Cancel() as cancel,
        signalled(cancel.request, reporter),
        Monitor(args.qmp, cancel) as monitor,
        Migration(show) as migration,
    ):
        source = Qemu(monitor, "source", show)
        destination = SnapshotDestination(args.directory)
        try:
            if args.record_command:
                _record(source, destination)
            limits = ChannelOptions(total_seconds=args.timeout)

            def start() -> str:
                return _listen(source, migration, destination, args, uri, limits)

            checkpoint(source, migration, destination.writer, start, options, cancel)
        finally:
            migration.close()
            destination.close()
    return 0


def _listen(
    source: Qemu,
    migration: Migration,
    destination: SnapshotDestination,
    args: argparse.Namespace,
    uri: str,
    limits: ChannelOptions,
) -> str:
    """Begin to await the QEMU, and return the URI that it can connect to."""
    from rdma_mig.migration.channels import start_incoming
    from rdma_mig.migration.uris import qemu_start_incoming_migration
    from rdma_mig.wire.uri import FdAddress

    if uri:
        rdma = None
        if uri.startswith("rdma:"):
            from rdma_mig.migration.rdma import RdmaOptions
            from rdma_mig.verbs.endpoint import EndpointOptions

            rdma = RdmaOptions(
                endpoint=EndpointOptions(device=args.rdma_device, gid_index=args.gid_index)
            )
        return qemu_start_incoming_migration(
            uri, migration=migration, process=destination.process, options=limits, rdma=rdma
        )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        private = source.offer(theirs.fileno())
        start_incoming(
            FdAddress(ours.detach(), source.name),
            migration=migration,
            process=destination.process,
            options=limits,
        )
    return private


def _record(source: Qemu, destination: SnapshotDestination) -> None:
    from rdma_mig.snapshot import RecordedCommand

    process = source.monitor.process
    line = process.command_line() if process else None
    if line is not None:
        destination.writer.write_command(RecordedCommand(line.arguments, line.directory))


def _device_address(device: str, gid_index: int | None) -> str:
    """Return an address of a device that a QEMU on this host can connect to."""
    from rdma_mig.verbs.choice import Choice
    from rdma_mig.verbs.host import require_rdma

    require_rdma()
    return Choice.of(device, gid_index).address()
