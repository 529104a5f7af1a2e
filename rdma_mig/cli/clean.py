# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate clean``: list, and remove, what runs that did not finish have left.

With ``--json`` a list of objects: ``path``, ``kind`` ("partial" or "incomplete"), ``in_use`` (a run
works on it), ``disk_bytes``, ``has_ram`` (all RAM is on disk: `recover` may
use it), ``removed``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
List what runs of rdma-migrate that did not finish have left: DIR.partial-PID of a run that was
killed, and DIR.incomplete of one that failed when the source had let go of its virtual machine.
The latter may be the only copy of it. Without --remove nothing is changed.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``clean`` to the command's sub-parsers (what ``add_subparsers`` returned)."""
    parser = subparsers.add_parser(
        "clean",
        help="list and remove what unfinished runs have left",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "place",
        metavar="DIR",
        type=Path,
        help="the snapshot directory that was to be made, or a directory that holds snapshots",
    )
    parser.add_argument(
        "--remove", action="store_true", help="remove partials on which no run works any more"
    )
    parser.add_argument(
        "--incomplete",
        action="store_true",
        help="with --remove: DIR.incomplete as well, and partials that hold all RAM",
    )
    parser.add_argument("-j", "--json", action="store_true", help="JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List, and with ``--remove`` remove; 0, or `SnapshotError` for what cannot be removed."""
    from rdma_mig.errors import UsageError
    from rdma_mig.snapshot import human
    from rdma_mig.snapshot.leftovers import find, remove
    from rdma_mig.words import printable

    if args.incomplete and not args.remove:
        raise UsageError("--incomplete says what else to remove: it goes with --remove")
    shown = []
    try:
        for leftover in find(args.place):
            wanted = args.remove and not leftover.in_use
            # What has all RAM may be the only copy of a machine, whatever it is called.
            may_matter = leftover.kind == "incomplete" or leftover.has_ram
            removed = wanted and (args.incomplete or not may_matter)
            if removed:
                remove(leftover)
            shown.append(asdict(leftover) | {"path": str(leftover.path), "removed": removed})
            if not args.json:
                state = "a run works on it" if leftover.in_use else leftover.kind
                if leftover.has_ram and not leftover.in_use:
                    state += ", with all RAM: see rdma-migrate recover"
                state = "removed" if removed else state
                print(f"{printable(leftover.path)}  {human(leftover.disk_bytes)}  {state}")
    finally:
        # Also when one could not be removed: what was done is told.
        if args.json:
            print(json.dumps(shown, indent=2))
    if not args.json and not shown:
        print(f"nothing was left at {printable(args.place)}")
    return 0
