# SPDX-License-Identifier: Apache-2.0
"""How fast a live migration may go, how fast it goes, and how fast the guest undoes it.

The figures and their formulas are those of QEMU (docs/engine.md, figures).
"""

from __future__ import annotations

from collections.abc import Callable

from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.migration.status import MigrationState

__all__ = ["BUFFER_DELAY", "XFER_LIMIT_RATIO", "AutoConverge", "DirtyRate", "Window"]

BUFFER_DELAY = 100
"""Milliseconds of a window."""

XFER_LIMIT_RATIO = 10
"""A window's part of what may be sent in a second."""

# Fewer bytes in a window say nothing about the bandwidth.
_GUARD_BYTES = 10_000
_EVALUATION_MS = 1000


class Window:
    """Charges what is sent to windows of 100 ms, and measures at the end of each.

    Args:
        state: ``bandwidth_limit`` is read; ``bytes_xfer``, ``xfer_limit``, ``mbps`` and
            ``expected_downtime`` are kept here.
        position: bytes that have left so far.
        clock: milliseconds.

    Attributes:
        bandwidth: bytes a millisecond in the last window; 0 before the first has ended.
    """

    def __init__(
        self, state: MigrationState, position: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self._state = state
        self._position = position
        self._clock = clock
        self._began = clock()
        self._began_at = position()
        self._pages_began = 0
        self._unlimited = False
        self.bandwidth = 0.0
        state.expected_downtime = state.max_downtime // 1_000_000
        self._open()

    def _open(self) -> None:
        state = self._state
        limit = 0 if self._unlimited else max(state.bandwidth_limit, 0)
        # What went beyond the allowance is part of the next one: pages go by groups, and a limit
        # of a few would be missed by far.
        state.bytes_xfer = max(0, state.bytes_xfer - state.xfer_limit) if state.xfer_limit else 0
        state.xfer_limit = limit // XFER_LIMIT_RATIO or (1 if limit else 0)

    def unlimited(self) -> None:
        """Do not limit from here on: the guest rests, and that is to be short."""
        self._unlimited = True
        self._open()

    def charge(self, size: int) -> None:
        """Charge bytes to the window."""
        self._state.bytes_xfer += size

    @property
    def left(self) -> int | None:
        """Bytes that may still be charged to this window; None for no limit."""
        if not self._state.xfer_limit:
            return None
        return max(0, self._state.xfer_limit - self._state.bytes_xfer)

    @property
    def seconds_left(self) -> float:
        """How long this window still is."""
        return max(0.0, self._began + BUFFER_DELAY - self._clock()) / 1000

    @property
    def threshold(self) -> int:
        """Bytes that would be sent within the downtime that is allowed; 0 before it is known."""
        return int(self.bandwidth * self._state.max_downtime / 1e6)

    def turn(self) -> bool:
        """Begin the next window if this one has ended; return whether it had."""
        now = self._clock()
        spent = now - self._began
        if spent < BUFFER_DELAY:
            return False
        state, position = self._state, self._position()
        moved = position - self._began_at
        self.bandwidth = moved / spent
        state.mbps = moved * 8 / spent / 1000
        if state.dirty_bytes_rate and moved > _GUARD_BYTES:
            state.expected_downtime = int(state.dirty_bytes_rate / self.bandwidth)
        pages = state.counters.normal_pages + state.counters.duplicate_pages
        state.pages_per_second = round((pages - self._pages_began) * 1000 / spent)
        self._began, self._began_at, self._pages_began = now, position, pages
        self._open()
        return True


class AutoConverge:
    """Takes time from a guest that dirties memory faster than the link carries it away.

    Each evaluation whose period has dirtied more than half of what it sent counts; the second
    one takes a step, and counting begins anew: 20 %, then 10 more at a time, 99 at most. Periods
    that were good do not count, and undo nothing.

    Attributes:
        percentage: that the guest is throttled by.
    """

    INITIAL = 20
    INCREMENT = 10
    MAXIMUM = 99
    TRIGGER_PERCENT = 50

    def __init__(self) -> None:
        self.percentage = 0
        self._high = 0

    def evaluate(self, dirtied: int, sent: int) -> bool:
        """Look at a period.

        Args:
            dirtied: bytes that the guest has dirtied in it.
            sent: bytes that were sent in it.

        Returns:
            whether the percentage has changed.
        """
        if dirtied <= sent * self.TRIGGER_PERCENT // 100:
            return False
        self._high += 1
        if self._high < 2:
            return False
        self._high = 0
        before = self.percentage
        step = self.INCREMENT if before else self.INITIAL
        self.percentage = min(before + step, self.MAXIMUM)
        return self.percentage != before


class DirtyRate:
    """Evaluates at each fetching of dirty pages, at most once a second, how many there were.

    Args:
        state: ``dirty_pages_rate`` and ``dirty_bytes_rate`` are kept here.
        position: bytes that have left so far.
        clock: milliseconds.
    """

    def __init__(
        self, state: MigrationState, position: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self._state = state
        self._position = position
        self._clock = clock
        self._since = clock()
        self._since_at = position()
        self._pages = 0

    def found(self, pages: int) -> tuple[int, int] | None:
        """Note pages that were found dirty.

        Returns:
            Bytes dirtied, and bytes sent, of the period, if one has ended.
        """
        self._pages += pages
        now = self._clock()
        spent = now - self._since
        if spent <= _EVALUATION_MS:
            return None
        position = self._position()
        dirtied, sent = self._pages * TARGET_PAGE_SIZE, position - self._since_at
        self._state.dirty_pages_rate = int(self._pages * 1000 / spent)
        self._state.dirty_bytes_rate = self._state.dirty_pages_rate * TARGET_PAGE_SIZE
        self._since, self._since_at, self._pages = now, position, 0
        return dirtied, sent
