# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate outgoing``: be the source of a migration, from a snapshot directory."""

from __future__ import annotations

import argparse
from typing import Any

from rdma_mig.cli.options import add_common

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Send the virtual machine in a snapshot directory to a destination: a QEMU that was started with
the same machine, memory size and devices and with -incoming rdma:HOST:PORT, or rdma-migrate
incoming. The snapshot stays as it is.

Exit status 0 means that the destination was seen to have loaded all device state.
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command to an argparse sub-parsers object."""
    parser = commands.add_parser(
        "outgoing",
        help="send the virtual machine in a snapshot directory to a QEMU",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="snapshot directory")
    parser.add_argument("uri", metavar="rdma:HOST:PORT", help="where the destination listens")
    parser.add_argument(
        "--rdma-pin-all",
        action="store_true",
        help="register all RAM at both ends at the start (QEMU's capability of that name)",
    )
    parser.add_argument(
        "--return-path",
        action="store_true",
        help="let the destination say how it ended, over a second connection; it must offer that "
        "(QEMU's capability return-path, up to 7.2 postcopy-ram; rdma-migrate incoming does)",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Send one snapshot.

    Raises:
        MigrationError: it failed; the exit status is the error's.
    """
    from rdma_mig.cli.reporting import Reporter, drive, tracing_to
    from rdma_mig.migration.rdma import RdmaOptions, rdma_start_outgoing_migration
    from rdma_mig.migration.send import SnapshotSource
    from rdma_mig.migration.state import Migration
    from rdma_mig.snapshot import Snapshot
    from rdma_mig.verbs.choice import Choice
    from rdma_mig.verbs.endpoint import EndpointOptions
    from rdma_mig.verbs.host import require_lockable, require_rdma
    from rdma_mig.verbs.loading import load
    from rdma_mig.wire.address import RdmaAddress

    RdmaAddress.parse(args.uri, listening=False)
    reporter = Reporter(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    with (
        Snapshot.open(args.directory) as snapshot,
        tracing_to(args.trace, "outgoing", reporter) as trace,
        Migration(reporter, trace) as migration,
    ):
        if before := snapshot.restorations():
            reporter.warn(
                f"this snapshot was sent to a QEMU before ({before[-1]}): if that guest has run "
                "since, the disks are no longer as this one left them, and if it runs, two guests "
                "would write to them"
            )
        # Reading a large snapshot takes long: what this host lacks is said before.
        require_rdma()
        load()
        Choice.of(args.rdma_device, args.gid_index)
        if args.rdma_pin_all:
            # A QEMU destination does not survive a source that gives up on it.
            total = sum(block.length for block in snapshot.blocks)
            require_lockable(total, "guest RAM (--rdma-pin-all)")
        source = SnapshotSource(snapshot)

        def start() -> None:
            source.load(migration)
            rdma_start_outgoing_migration(
                migration,
                args.uri,
                ram=source.ram,
                save=source.save,
                options=RdmaOptions(
                    pin_all=args.rdma_pin_all,
                    return_path=args.return_path,
                    total_seconds=args.timeout,
                    stall_seconds=args.stall_timeout,
                    endpoint=EndpointOptions(device=args.rdma_device, gid_index=args.gid_index),
                ),
            )

        try:
            return drive(migration, reporter, start)
        finally:
            migration.close()
            source.close()
