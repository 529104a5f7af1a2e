# SPDX-License-Identifier: Apache-2.0
"""Options that the migrating commands share."""

from __future__ import annotations

import argparse
import math

__all__ = ["add_common", "seconds"]


def seconds(text: str) -> float:
    """Parse a number of seconds, positive and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add limits and output options."""
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="limit on the migration from its connection on; none by default",
    )
    limits.add_argument(
        "--stall-timeout",
        type=seconds,
        metavar="SECONDS",
        help="give up on a peer that is alive and says nothing for so long; never by default",
    )
    output = parser.add_argument_group("output")
    output.add_argument("-j", "--json", action="store_true", help="print events, one JSON a line")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress and no summary")
    output.add_argument("-v", "--verbose", action="store_true", help="say more of the connection")
