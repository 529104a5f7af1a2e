# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate convert``: a migration stream in a file into a snapshot, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rdma_mig.cli.options import size

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Make a snapshot of a migration stream in a file, such as QEMU writes with migrate "exec:cat > FILE",
or a stream of a snapshot. Which of the two follows from what SOURCE is.

Nothing is lost or added: a snapshot that goes through a stream is the same again, byte for byte,
and so is a stream that this command has written. A stream of a QEMU may hold a page several times;
each page stands once, in order, in the one made of it.
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command to an argparse sub-parsers object."""
    parser = commands.add_parser(
        "convert",
        help="a stream in a file into a snapshot directory, or back",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a file, or a directory")
    parser.add_argument("target", metavar="TARGET", type=Path, help="what to make; must not exist")
    parser.add_argument(
        "--max-ram", type=size, metavar="SIZE", help="refuse a guest with more RAM than this"
    )
    parser.add_argument("-j", "--json", action="store_true", help="print events, one JSON a line")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert one machine.

    Raises:
        MigrationError: it failed; nothing is left of TARGET.
    """
    from rdma_mig.cli.reporting import Reporter, drive
    from rdma_mig.cli.signals import cancelled_by_signals
    from rdma_mig.errors import UsageError
    from rdma_mig.migration.channels import start_incoming, start_outgoing
    from rdma_mig.migration.receive import SnapshotDestination
    from rdma_mig.migration.send import SnapshotSource
    from rdma_mig.migration.state import Migration
    from rdma_mig.snapshot import Snapshot
    from rdma_mig.wire.uri import FileAddress

    if args.target.exists():
        raise UsageError(f"{args.target} exists", remedy="name what does not exist yet")
    reporter = Reporter(as_json=args.json, quiet=args.quiet, verbose=False)
    with Migration(reporter) as migration, cancelled_by_signals(migration.cancel):
        if args.source.is_dir():
            with Snapshot.open(args.source) as snapshot:
                source = SnapshotSource(snapshot)

                def start() -> None:
                    source.load(migration)
                    start_outgoing(migration, FileAddress(str(args.target)), save=source.save)

                try:
                    return drive(migration, reporter, start)
                finally:
                    migration.close()
                    source.close()
        destination = SnapshotDestination(args.target, max_ram=args.max_ram)
        try:
            return drive(
                migration,
                reporter,
                lambda: start_incoming(
                    FileAddress(str(args.source)), migration=migration, process=destination.process
                ),
            )
        finally:
            migration.close()
            destination.close()
