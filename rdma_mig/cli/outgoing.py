# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate outgoing``: be the source of a migration, from a snapshot directory."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rdma_mig.cli.options import add_common, connections, rdma_options

if TYPE_CHECKING:
    from rdma_mig.snapshot import Snapshot

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Send the virtual machine in a snapshot directory to a destination: a QEMU that was started with
the same machine, memory size and devices and with -incoming rdma:HOST:PORT, or rdma-migrate
incoming. The snapshot stays as it is.

Without RDMA: unix:PATH, tcp:HOST:PORT, fd:N, exec:COMMAND or file:PATH, as in QEMU.

Exit status 0 means that the destination was seen to have loaded all device state; with exec: and
file: that the stream was taken whole, since nobody can say more.
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
    parser.add_argument(
        "uri",
        metavar="URI",
        help="where the destination listens: rdma:HOST:PORT, tcp:HOST:PORT or unix:PATH; or fd:N, "
        "exec:COMMAND (its input) or file:PATH[,offset=BYTES]",
    )
    parser.add_argument(
        "--rdma-pin-all",
        action="store_true",
        help="register all RAM at both ends at the start (QEMU's capability of that name)",
    )
    parser.add_argument(
        "--assume-zero-destination",
        action="store_true",
        help="send no zeros for RAM blocks of 64 MiB and more: quicker where most memory is zero, "
        "and wrong, unnoticed, where such a block of the destination is not all zero beforehand "
        "(its RAM in a file that was used before)",
    )
    parser.add_argument(
        "--connections",
        type=connections,
        default=1,
        metavar="N",
        help="write RAM over this many connections, 1 to 16 (default 1), for hardware that one "
        "queue pair cannot fill; to an rdma-migrate, since a QEMU takes one",
    )
    parser.add_argument(
        "--return-path",
        action=argparse.BooleanOptionalAction,
        help="let the destination say how it ended. Over RDMA, over a second connection, which it "
        "must offer (QEMU's capability return-path, up to 7.2 postcopy-ram; rdma-migrate incoming "
        "does), and off by default. On a socket any destination does, and it is on",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Send one snapshot.

    Raises:
        MigrationError: it failed; the exit status is the error's.
    """
    from rdma_mig.cli.following import following
    from rdma_mig.cli.reporting import Reporter, drive
    from rdma_mig.cli.signals import cancelled_by_signals
    from rdma_mig.migration.options import ChannelOptions
    from rdma_mig.migration.send import SnapshotSource
    from rdma_mig.migration.uris import qemu_start_outgoing_migration
    from rdma_mig.snapshot import Snapshot
    from rdma_mig.wire.uri import FdAddress, parse_uri

    rdma = rdma_options(args, listening=False)
    reporter = Reporter(
        as_json=args.json,
        quiet=args.quiet,
        verbose=args.verbose,
        # Standard output may be the stream's.
        out=sys.stderr if parse_uri(args.uri, listening=False) == FdAddress(1) else None,
    )
    with (
        Snapshot.open(args.directory) as snapshot,
        following(args, "outgoing", args.directory, reporter) as followers,
        followers.migration() as migration,
        cancelled_by_signals(migration.cancel),
    ):
        if before := snapshot.restorations():
            reporter.warn(
                f"this snapshot was sent to a QEMU before ({before[-1]}): if that guest has run "
                "since, the disks are no longer as this one left them, and if it runs, two guests "
                "would write to them"
            )
        # Reading a large snapshot takes long: what this host lacks is said before.
        if rdma is not None:
            _require_host(args, snapshot)
        source = SnapshotSource(snapshot)

        def start() -> None:
            source.load(migration)
            qemu_start_outgoing_migration(
                migration,
                args.uri,
                ram=source.ram,
                save=source.save,
                options=ChannelOptions(
                    return_path=args.return_path,
                    total_seconds=args.timeout,
                    stall_seconds=args.stall_timeout,
                ),
                rdma=rdma,
            )

        try:
            return drive(migration, followers, start)
        finally:
            migration.close()
            source.close()


def _require_host(args: argparse.Namespace, snapshot: Snapshot) -> None:
    from rdma_mig.verbs.choice import Choice
    from rdma_mig.verbs.host import require_lockable, require_rdma
    from rdma_mig.verbs.loading import load

    require_rdma()
    load()
    Choice.of(args.rdma_device, args.gid_index)
    if args.rdma_pin_all:
        # A QEMU destination does not survive a source that gives up on it.
        total = sum(block.length for block in snapshot.blocks)
        require_lockable(total, "guest RAM (--rdma-pin-all)")
