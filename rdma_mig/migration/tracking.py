# SPDX-License-Identifier: Apache-2.0
"""A guest's dirty tracker within one migration: the guest is stopped where that asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.migration.interfaces import Guest

__all__ = ["Tracking"]


class Tracking:
    """Tracks what a guest writes, within its ``with`` block; nothing, if it has no tracker.

    A tracker that is not atomic loses what is written while it is asked, so the guest is stopped
    meanwhile, and goes on after that.

    Args:
        guest: of the migration.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._tracker = guest.tracker

    def __enter__(self) -> Tracking:
        if self._tracker is not None:
            with self._resting(at_rest=False):
                self._tracker.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker is not None:
            self._tracker.stop()

    def harvest(self, into: Sequence[DirtyBitmap], *, at_rest: bool = False) -> int:
        """Find what was written since the last time.

        Args:
            into: a bitmap for each block, in stream order; what is found is added.
            at_rest: the guest has been stopped for good.

        Returns:
            how many pages were found.

        Raises:
            HostError: this host could not; what was written meanwhile is unknown.
        """
        tracker = self._tracker
        if tracker is None:
            return 0
        with self._resting(at_rest=at_rest):
            return sum(tracker.harvest(index, bitmap) for index, bitmap in enumerate(into))

    @contextmanager
    def _resting(self, *, at_rest: bool) -> Iterator[None]:
        assert self._tracker is not None
        if at_rest or self._tracker.atomic:
            yield
            return
        self._guest.stop()
        try:
            yield
        finally:
            self._guest.resume()
