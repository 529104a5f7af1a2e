# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate recover``: make a snapshot of what a run has left, when all of it is there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Turn DIR.partial-PID or DIR.incomplete into DIR, when RAM and all device state are in it; everything
is compared with its digests first. Otherwise say what is missing, and change nothing.

Whether the source has let go of its virtual machine says `info status` there: postmigrate. If the
guest runs there, do not restore the snapshot: two guests would write to one disk.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``recover`` to the command's sub-parsers (what ``add_subparsers`` returned)."""
    parser = subparsers.add_parser(
        "recover",
        help="make a snapshot of what an unfinished run has left, when it is whole",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("left", metavar="PATH", type=Path, help="DIR.partial-PID or DIR.incomplete")
    parser.add_argument("-j", "--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Recover one; 0, or `SnapshotError` for what is not whole."""
    from rdma_mig.snapshot.recovery import recover
    from rdma_mig.words import printable

    path = recover(args.left)
    if args.json:
        print(json.dumps({"path": str(path)}))
        return 0
    print(
        f"{printable(path)} is whole; before you use it, see that the source is in postmigrate "
        "(`info status` there) and stays so"
    )
    return 0
