# SPDX-License-Identifier: Apache-2.0
"""Progress as people see it: a line that is kept up on a terminal (with rich), else lines."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from rdma_mig.metrics.meter import Meter, Standing
from rdma_mig.words import size_of

__all__ = ["PHASES", "Display", "terminal_display", "words_of"]

PHASES = {
    "load": "reading the snapshot",
    "setup": "preparing memory",
    "round": "RAM round",
    "transfer": "writing RAM to the destination",
    "device-state": "receiving device state",
    "write": "writing the snapshot",
}
_REFRESH = 4  # a second


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def words_of(standing: Standing) -> str:
    """Return where a migration stands, as a line; what is not known is left out."""
    text = PHASES.get(standing.phase, standing.phase)
    per_cent = standing.per_cent
    if standing.round is not None:
        text = f"{text} {standing.round}"
    elif per_cent is not None and standing.total:
        text = f"{text}: {per_cent} % of {size_of(standing.total)}"
    elif standing.total or standing.done:
        text = f"{text}: {size_of(standing.total or standing.done or 0)}"
    parts = [text]
    if standing.rate:
        share = "" if standing.share is None else f" ({100 * standing.share:.0f} % of the link)"
        parts.append(f"{size_of(standing.rate)}/s{share}")
    if standing.dirty_rate is not None:
        parts.append(f"the guest dirties {size_of(standing.dirty_rate)}/s")
    if standing.expected_downtime is not None:
        parts.append(f"expected downtime {1000 * standing.expected_downtime:.0f} ms")
    if standing.left is not None and per_cent is not None and per_cent < 100:
        parts.append(f"{_duration(standing.left)} left")
    return ", ".join(parts)


class Display(Protocol):
    """A line on a terminal that is kept up by itself."""

    def start(self) -> None:
        """Show it from now on. Idempotent."""
        ...

    def stop(self) -> None:
        """Leave the line as it is. Idempotent."""
        ...


def terminal_display(meter: Meter) -> Display | None:
    """Return what shows the meter on standard error; None where lines have to do.

    That is where it is no terminal, or one that can do nothing, and without the library rich.
    """
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        return None

    def show() -> Any:
        standing = meter.look()
        text = Text(words_of(standing), overflow="ellipsis", no_wrap=True)
        if standing.per_cent is None:
            return text
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=100, completed=standing.per_cent, width=20), text)
        return row

    return Live(
        console=console, get_renderable=show, refresh_per_second=_REFRESH, redirect_stdout=False
    )
