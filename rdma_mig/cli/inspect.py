# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate inspect``: what a snapshot directory holds, and whether it is intact.

With ``--json`` one object, whose keys stay as they are (new ones may be added):

``path``, ``format_version``, ``machine``;
``stream``: ``ram_section_id``, ``footers``, ``page_bits``;
``ram``: ``length`` and ``data_bytes`` in all, and ``blocks``, a list in stream order of ``index``,
``name``, ``length``, ``data_bytes`` (bytes in pages that are not zero), ``page_size`` and
``guest_address`` (null where the source sent none), ``digests_sha256``, and ``shared_blocks``, a
list of the blocks that the source kept to itself: ``position`` in its list, ``name``, ``length``,
``page_size``, ``guest_address``;
``config``: ``size``, ``sha256``;
``device_state``: ``size``, ``sha256``, ``eof_offset``;
``description``: null where the source sent none, else ``size``, ``sha256``, ``page_size``,
``devices`` (a list of ``name``, ``instance_id``, ``vmsd_name``, ``version``) and ``error`` (null,
or why page size and devices are null);
``command``: null where it is not recorded how the QEMU was started, else ``arguments`` and
``directory``;
``restored``: a text for each time that it was sent to a QEMU;
``verified``: true after ``--verify``, else null.

Of a migration stream in a file: ``path``, ``machine``; ``stream``: ``ram_section_id``, ``footers``,
``rounds``; ``ram``: ``length``, ``blocks`` and how often pages came, ``normal_pages``,
``duplicate_pages``, ``xbzrle_pages``; ``device_state``: ``size``, ``eof_offset``; ``devices``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add ``inspect`` to the command's sub-parsers (what ``add_subparsers`` returned)."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a snapshot directory holds",
        description="Show what a snapshot directory holds: machine, RAM blocks, devices, digests.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="it, or a stream in a file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything and compare it with its digests; exit 1 at the first difference",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is at ``args.directory``; 0, or `MigrationError` for what is wrong with it."""
    # Here and not above: --help and the other commands need not wait for it.
    from rdma_mig.cli.inspection import lines_of, report_of
    from rdma_mig.snapshot import Snapshot

    if args.directory.is_file():
        from rdma_mig.cli.stream_inspection import lines_of_stream, report_of_stream

        report = report_of_stream(args.directory)
        print(json.dumps(report, indent=2) if args.json else "\n".join(lines_of_stream(report)))
        return 0
    with Snapshot.open(args.directory) as snapshot:
        if args.verify:
            snapshot.verify()
        report = report_of(snapshot, verified=args.verify)
    print(json.dumps(report, indent=2) if args.json else "\n".join(lines_of(report)))
    return 0
