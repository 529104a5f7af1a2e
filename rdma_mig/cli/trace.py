# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate trace``: shows what ``--trace`` has written, checks it, draws it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdma_mig.trace.pairs import Traced

__all__ = ["add_parser"]

# Seconds between two looks at a trace that is being written.
_LOOK_AGAIN = 0.1
_DESCRIPTION = """\
Read what incoming and outgoing have written with --trace.

show prints a line a record. check holds a trace, or those of both ends of one migration, against
the rules of the protocol and names the first record that breaks one. chart draws a sequence
diagram and a time line.
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command to an argparse sub-parsers object."""
    parser = commands.add_parser(
        "trace",
        help="show, check or draw what --trace has written",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Of this program's own kind, whose usage errors are one line.
    verbs = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=type(parser)
    )
    show = verbs.add_parser("show", help="print a line a record")
    show.add_argument("file", metavar="FILE", help="trace file")
    show.add_argument(
        "-f", "--follow", action="store_true",
        help="go on with what is being written, until the migration has ended, or Ctrl-C",
    )  # fmt: skip
    show.set_defaults(run=_show)
    check = verbs.add_parser(
        "check", help="hold it against the protocol's rules; exit status 1 when it breaks one"
    )
    check.add_argument("file", metavar="FILE", help="trace file")
    check.add_argument("other", metavar="FILE2", nargs="?", help="trace of the other end")
    check.add_argument("-j", "--json", action="store_true", help="one JSON object instead of text")
    check.set_defaults(run=_check)
    chart = verbs.add_parser(
        "chart", help="draw sequence diagram and time line (with matplotlib, the extra 'chart')"
    )
    chart.add_argument("file", metavar="FILE", help="trace file")
    chart.add_argument("other", metavar="FILE2", nargs="?", help="trace of the other end")
    chart.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT", help="picture, .svg or .png"
    )
    chart.set_defaults(run=_chart)


def _show(args: argparse.Namespace) -> int:
    from rdma_mig.trace.reading import read_trace
    from rdma_mig.trace.show import line_of

    def more() -> bool:
        sys.stdout.flush()
        time.sleep(_LOOK_AGAIN)
        return True

    role, before = "", 0.0
    print(f"{'seconds':>12} {'since last':>11}  {'who':<11}  {'what':<52} size")
    try:
        for record in read_trace(args.file, more if args.follow else None):
            role = role or str(record["role"])
            print(line_of(record, role, before))
            before = record.record.t
    finally:
        # What could be read stands before what could not.
        sys.stdout.flush()
    return 0


def _judged(path: str) -> Traced:
    from rdma_mig.errors import MigrationError
    from rdma_mig.trace.pairs import Traced
    from rdma_mig.trace.reading import read_trace
    from rdma_mig.trace.rules import Violation, check_records

    records = list(read_trace(path))
    try:
        return Traced(path, records, check_records(records))
    except Violation as violation:
        raise MigrationError(f"{path}: {violation}") from None


def _check(args: argparse.Namespace) -> int:
    from rdma_mig.errors import MigrationError
    from rdma_mig.trace.pairs import PairViolation, check_pair

    ends = [_judged(path) for path in (args.file, args.other) if path is not None]
    if len(ends) > 1:
        try:
            check_pair(*ends)
        except PairViolation as violation:
            raise MigrationError(f"{violation.name}: {violation}") from None
    if args.json:
        traces = [
            {
                "path": end.name,
                "records": len(end.records),
                "role": end.rules.role,
                "phases": end.rules.phases,
                "status": end.rules.status,
            }
            for end in ends
        ]
        print(json.dumps({"traces": traces}))
        return 0
    for end in ends:
        print(
            f"{end.name}: {len(end.records)} records, {end.rules.role}, "
            f"{end.rules.phases} RAM phases, {end.rules.status}: keeps all rules"
        )
    if len(ends) > 1:
        print("both ends tell the same")
    return 0


def _chart(args: argparse.Namespace) -> int:
    from rdma_mig.trace.chart import draw
    from rdma_mig.trace.pairs import Traced
    from rdma_mig.trace.pairs import order as ordered
    from rdma_mig.trace.reading import read_trace
    from rdma_mig.trace.rules import TraceRules

    def load(path: str) -> Traced:
        records = list(read_trace(path))
        # A picture is wanted of a trace that breaks rules most of all.
        rules = TraceRules()
        rules.role = str(records[0]["role"])
        return Traced(path, records, rules)

    ends = [load(path) for path in (args.file, args.other) if path is not None]
    if len(ends) > 1:
        ends = list(ordered(*ends))
    draw(ends[0], ends[1] if len(ends) > 1 else None, args.output)
    print(args.output)
    return 0
