# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate migrate``: a running guest from one QEMU into another."""

from __future__ import annotations

import argparse
from typing import Any

from rdma_mig.cli.driving import add_driving, events_of, meeting_uri, sending_options, signalled

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Migrate a running guest from one QEMU into another, which was started with the same machine and with
-incoming defer. Both are driven over their QMP sockets (one of another host's can be had with
ssh -L); RAM goes from one to the other. Their capabilities and parameters are set for it, and set
back. When it fails or is cancelled, the guest runs on at the source.
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command to an argparse sub-parsers object."""
    parser = commands.add_parser(
        "migrate",
        help="migrate a guest from one QEMU into another, by QMP",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--qmp", required=True, metavar="SOURCE", help="QMP socket of the source")
    parser.add_argument(
        "--to-qmp", required=True, metavar="DESTINATION", help="QMP socket of the destination"
    )
    parser.add_argument(
        "uri",
        metavar="URI",
        nargs="?",
        help="where the destination shall listen: rdma:HOST:PORT, tcp:HOST:PORT or unix:PATH; "
        "by default a socket that both are given, if they are on this host",
    )
    add_driving(parser, sending=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Migrate.

    Raises:
        MigrationError: it failed; the exit status is the error's.
    """
    from rdma_mig.cli.reporting import Reporter
    from rdma_mig.errors import UsageError
    from rdma_mig.manager.handover import handover
    from rdma_mig.manager.monitor import Monitor
    from rdma_mig.manager.qemu import Qemu
    from rdma_mig.waits import Cancel, Deadline

    if args.qmp == args.to_qmp:
        raise UsageError("a QEMU cannot migrate into itself", remedy="name two QMP sockets")
    remedy = "say rdma:HOST:PORT, tcp:HOST:PORT or unix:PATH, with an address of the destination"
    # A QEMU says where it listens over TCP, and not over RDMA.
    tcp = (args.uri or "").startswith("tcp:")
    uri = meeting_uri(args.uri, None, listening=tcp, remedy=remedy)
    options = sending_options(args, uri)
    reporter = Reporter(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    show = events_of(reporter)
    with (
        Cancel() as cancel,
        signalled(cancel.request, reporter),
        Monitor(args.qmp, cancel) as first,
        Monitor(args.to_qmp, cancel) as second,
    ):
        source, destination = Qemu(first, "source", show), Qemu(second, "destination", show)
        handover(source, destination, options, cancel, Deadline.after(args.timeout))
    return 0
