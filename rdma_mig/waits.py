# SPDX-License-Identifier: Apache-2.0
"""Deadlines, and a cancellation that any thread or signal handler may ask for."""

from __future__ import annotations

import math
import os
import select
import time
import warnings
from dataclasses import dataclass

from rdma_mig.closing import Closing
from rdma_mig.errors import MigrationCancelled, MigrationTimeout

__all__ = ["Cancel", "Deadline", "TransportLimits", "nobody_came"]


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on CLOCK_MONOTONIC, or none.

    Attributes:
        ns: nanoseconds on CLOCK_MONOTONIC; 0 means that there is no limit.
        seconds: how long the limit was when it was set, for messages; 0 for none.
    """

    ns: int
    seconds: float

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Set a limit ``seconds`` from now; None or 0 for no limit."""
        if not seconds:
            return cls(0, 0.0)
        return cls(time.monotonic_ns() + int(seconds * 1e9), seconds)

    def sooner(self, other: Deadline) -> Deadline:
        """Return the earlier of two limits."""
        if not self.ns or (other.ns and other.ns < self.ns):
            return other
        return self

    @property
    def remaining(self) -> float | None:
        """Seconds left, 0 when it has passed; None without a limit."""
        if not self.ns:
            return None
        return max(0.0, (self.ns - time.monotonic_ns()) / 1e9)

    @property
    def passed(self) -> bool:
        """Whether the limit has been reached."""
        return bool(self.ns) and time.monotonic_ns() >= self.ns


class TransportLimits:
    """Limits on the waits of an established connection.

    Args:
        total: seconds for the whole migration; None for no limit.
        stall: seconds that a live peer may stay silent; None for no limit.
    """

    def __init__(self, total: float | None = None, stall: float | None = None) -> None:
        self.total = Deadline.after(total)
        self.stall = stall

    def next_wait(self) -> Deadline:
        """Return the limit of a wait that begins now."""
        return self.total.sooner(Deadline.after(self.stall))


def nobody_came(awaited: str, where: str, deadline: Deadline) -> MigrationTimeout:
    """Nobody has connected to a listener within its limit.

    Args:
        awaited: who, such as "a source".
        where: the address that was listened at.
        deadline: which has passed.
    """
    return MigrationTimeout(
        f"{awaited} did not connect to {where} within {deadline.seconds:g} s",
        remedy="see that the other end was started; `incoming` waits longer with --accept-timeout",
    )


class Cancel(Closing):
    """A flag with a descriptor, so that a wait in poll() ends when it is raised.

    ``request()`` may be called from any thread and from a signal handler, at any time and more
    than once, also after ``close()``.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._requested = False

    def request(self) -> None:
        """Ask for the end of what is going on."""
        self._requested = True
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    @property
    def requested(self) -> bool:
        """Whether the end was asked for."""
        return self._requested

    def fileno(self) -> int:
        """Return the descriptor: readable from the first request on."""
        return self._fd

    def wait(self, seconds: float) -> bool:
        """Sleep for so long, or until the end is asked for; return whether it was."""
        if not self._requested and seconds > 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            poll.poll(math.ceil(seconds * 1000))
        return self._requested

    def check(self, doing: str) -> None:
        """Raise MigrationCancelled when the end was asked for; ``doing`` says what is left off."""
        if self._requested:
            raise MigrationCancelled(f"cancelled while {doing}")

    def close(self) -> None:
        """Give the descriptor back. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn("unclosed Cancel", ResourceWarning, stacklevel=2)
            self.close()
