# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate doctor``: look at this host, another one, and the path between them.

With ``--json`` one object: ``host``, ``level``, ``findings`` (a list of ``check``, ``level``,
``message``, ``remedy``); with a peer also ``peer``, the same of the other host, and ``path``, one
finding.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rdma_mig.cli.options import size

if TYPE_CHECKING:
    from rdma_mig.host.findings import Finding, Report

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Look at what a migration over RDMA needs of this host: libraries, devices, ports, addresses,
permissions, memory and limits. Each finding is ok, a warning or a blocker, with the command that
mends it. Exit status 3 where something blocks, else 0.

With doctor --serve on another host and --peer HOST here, both hosts are looked at, and a little
memory is migrated over the path between them.
"""

_MARKS = {"ok": "ok     ", "warning": "WARNING", "blocker": "BLOCKER"}


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the command's sub-parsers (what ``add_subparsers`` returned)."""
    parser = subparsers.add_parser(
        "doctor",
        help="find out whether this host, and the path to another, can migrate over RDMA",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ram", type=size, metavar="SIZE", help="the guest's RAM, such as 16G, to judge limits by"
    )
    parser.add_argument("--rdma-device", metavar="NAME", help="look at this device only")
    parser.add_argument("--qmp", metavar="SOCKET", help="look at the QEMU at this QMP socket too")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--peer",
        metavar="HOST[:PORT]",
        help="look at that host too, where doctor --serve runs, and at the path to it",
    )
    other.add_argument(
        "--serve",
        nargs="?",
        const="",
        metavar="HOST[:PORT]",
        help="wait for one host that asks with --peer, and answer it; every address and TCP port "
        "18515 by default",
    )
    parser.add_argument("-j", "--json", action="store_true", help="JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, and tell; exit status 3 where something blocks."""
    from rdma_mig.cli.signals import cancelled_by_signals, interrupted_by_signals
    from rdma_mig.errors import ExitStatus
    from rdma_mig.host.doctor import examine
    from rdma_mig.host.findings import Level, worst
    from rdma_mig.waits import Cancel

    def look() -> Report:
        with interrupted_by_signals():  # a QEMU may take its time to answer
            return examine(ram=args.ram, device=args.rdma_device, qmp=args.qmp)

    ours: Report
    theirs: Report | None = None
    path: Finding | None = None
    if args.peer is None and args.serve is None:
        ours = look()
    else:
        with Cancel() as cancel, cancelled_by_signals(cancel.request):
            ours, theirs, path = _both(args, look, cancel)
    if args.json:
        print(json.dumps(_as_json(ours, theirs, path), indent=2))
    else:
        _show(ours)
        if theirs is not None:
            _show(theirs)
        if path is not None:
            print("path")
            _show_finding(path)
    reports = [report for report in (ours, theirs) if report is not None]
    found = [finding for report in reports for finding in report.findings]
    blocked = worst([*found, *([path] if path else [])]) is Level.BLOCKER
    return int(ExitStatus.HOST_CANNOT if blocked else ExitStatus.DONE)


def _both(args: argparse.Namespace, look: Any, cancel: Any) -> tuple[Report, Report, Finding]:
    from rdma_mig.host.meeting import DEFAULT_PORT, host_port
    from rdma_mig.host.path import ask, serve

    if args.peer is not None:
        ours = look()
        host, port = host_port(args.peer)
        theirs, path = ask(host, port, ours, cancel, args.rdma_device)
        return ours, theirs, path
    host, port = host_port(args.serve) if args.serve else ("0.0.0.0", DEFAULT_PORT)

    def listening(where: str) -> None:
        print(f"serving on {where}", file=sys.stderr, flush=True)

    return serve(host, port, look, cancel, listening)


def _as_json(ours: Report, theirs: Report | None, path: Finding | None) -> dict[str, Any]:
    shown = ours.as_json()
    if theirs is not None:
        shown["peer"] = theirs.as_json()
    if path is not None:
        shown["path"] = asdict(path)
    return shown


def _show(report: Report) -> None:
    print(report.host)
    for finding in report.findings:
        _show_finding(finding)


def _show_finding(finding: Finding) -> None:
    print(f"  {_MARKS[finding.level.value]} {finding.check}: {finding.message}")
    if finding.remedy:
        print(f"          {finding.remedy}")
