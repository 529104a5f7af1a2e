# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate incoming``: be the destination of a migration, keep it as a snapshot."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from rdma_mig.cli.options import add_common, network, rdma_options, seconds, size

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Be the destination of one migration, from a QEMU or from rdma-migrate outgoing, and keep the
virtual machine in a directory.

In QEMU, at the source:
  migrate_set_capability rdma-pin-all on
  migrate -d rdma:HOST:PORT

Without RDMA: unix:PATH, tcp:HOST:PORT, fd:N, exec:COMMAND or file:PATH, as in QEMU.
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command to an argparse sub-parsers object."""
    parser = commands.add_parser(
        "incoming",
        help="receive a virtual machine from a QEMU into a snapshot directory",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "uri",
        metavar="URI",
        help="where the machine comes from: rdma:HOST:PORT, tcp:HOST:PORT, unix:PATH, fd:N, "
        "exec:COMMAND (its output) or file:PATH[,offset=BYTES]; port 0 takes a free one, host "
        "0.0.0.0 or [::] every address",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="snapshot directory to make; it must not exist",
    )
    parser.add_argument(
        "--ready-fd",
        type=int,
        metavar="N",
        help="write the address to this descriptor when a source can connect, and close it",
    )
    parser.add_argument(
        "--accept-timeout",
        type=seconds,
        metavar="SECONDS",
        help="how long to wait for a source; for ever by default",
    )
    parser.add_argument(
        "--allow",
        action="append",
        type=network,
        default=[],
        metavar="ADDR[/LEN]",
        help="take a migration from this address or network only; may be given more than once",
    )
    parser.add_argument(
        "--max-ram",
        type=size,
        metavar="SIZE",
        help="refuse a guest with more RAM than this (such as 16G) before any is allocated; by "
        "default one that does not fit into the memory available",
    )
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        help="receive RAM into huge pages that were set aside on this host (vm.nr_hugepages): they "
        "are prepared in less than half the time; blocks that are no whole number of them (ROMs) "
        "stay out",
    )
    parser.add_argument(
        "--sync",
        choices=("before", "after"),
        default="after",
        help="when RAM goes to disk: before the source may let go of its guest, which adds the "
        "time of writing it to the downtime, or after (the default: space is set aside before)",
    )
    parser.add_argument(
        "--shared-block",
        action="append",
        metavar="NAME",
        help="RAM block that a source with x-ignore-shared does not send, because it is shared; "
        "again for each one, `none` for no block; guessed by default",
    )
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Receive one migration.

    Raises:
        MigrationError: it failed; the exit status is the error's.
    """
    from rdma_mig.cli.following import following
    from rdma_mig.cli.reporting import Reporter, drive
    from rdma_mig.cli.signals import cancelled_by_signals
    from rdma_mig.migration.options import ChannelOptions
    from rdma_mig.migration.receive import SnapshotDestination
    from rdma_mig.migration.uris import qemu_start_incoming_migration

    # Before anything is made on disk: what is wrong with the command line itself.
    rdma = rdma_options(args, listening=True)
    reporter = Reporter(
        as_json=args.json, quiet=args.quiet, verbose=args.verbose, ready_fd=args.ready_fd
    )
    with (
        following(args, "incoming", args.output, reporter) as followers,
        followers.migration() as migration,
        cancelled_by_signals(migration.cancel),
    ):

        def start() -> None:
            qemu_start_incoming_migration(
                args.uri,
                migration=migration,
                process=destination.process,
                options=ChannelOptions(
                    total_seconds=args.timeout,
                    stall_seconds=args.stall_timeout,
                    accept_seconds=args.accept_timeout,
                    allow=tuple(args.allow),
                ),
                rdma=rdma,
            )

        destination = SnapshotDestination(
            args.output,
            args.shared_block,
            max_ram=args.max_ram,
            huge_pages=args.huge_pages,
            sync_before=args.sync == "before",
            # A file stays what it is, whatever becomes of this process.
            custodian=not args.uri.startswith("file:"),
        )
        try:
            for left in destination.writer.stale:
                reporter.warn(
                    f"{left} is left from a run that did not finish; remove it: "
                    f"rdma-migrate clean --remove {shlex.quote(args.output)}"
                )
            return drive(migration, followers, start)
        finally:
            migration.close()
            destination.close()
