# SPDX-License-Identifier: Apache-2.0
"""How far a migration is and how fast it goes, worked out whenever somebody looks."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from rdma_mig.metrics.ports import counters, link_rate
from rdma_mig.migration.events import Connected, MigrationEvent, Progress
from rdma_mig.migration.state import Migration

__all__ = ["Meter", "Standing"]

_WINDOW = 3.0  # seconds over which the rate is that of the present
_LEAST = 0.2  # seconds that two looks lie apart at least


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a migration stands.

    Attributes:
        phase: as in the event `progress`.
        round: number of the RAM phase, in phase "round".
        done, total: bytes; None where they are not known, or are no measure of what is left.
        rate: bytes a second.
        share: part of what the link carries, from 0.
        dirty_rate: bytes a second that the guest writes.
        expected_downtime: seconds that the guest would rest if it were stopped now.
        left: seconds until the phase has ended, as it goes now.
    """

    phase: str
    round: int | None = None
    done: int | None = None
    total: int | None = None
    rate: float | None = None
    share: float | None = None
    dirty_rate: float | None = None
    expected_downtime: float | None = None
    left: float | None = None

    @property
    def per_cent(self) -> int | None:
        """How much is done; None where it is not known."""
        if self.done is None or not self.total:
            return None
        return min(100 * self.done // self.total, 100)


class Meter:
    """Takes events, and looks at the migration's own counters between them. For one migration.

    At a source RAM is counted as it is sent. A destination over RDMA does not see what arrives; its
    rate is what the kernel counts of the port, where the device has such a counter.
    """

    def __init__(self) -> None:
        self.migration: Migration | None = None
        self._phase = ""
        self._done = 0
        self._total = 0
        self._ram_total = 0
        self._device: tuple[str, int] | None = None
        self._link: float | None = None
        self._sends = True
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=256)

    def event(self, event: MigrationEvent) -> None:
        """Take note of an event."""
        match event:
            case Connected(device=str(device), port=int(port)):
                self._device = device, port
                self._link = link_rate(device, port)
            case Progress():
                if event.phase != self._phase:
                    self._samples.clear()
                if event.phase == "setup":
                    self._ram_total = event.total
                self._phase, self._done, self._total = event.phase, event.done, event.total

    def _dealt(self) -> int:
        """Bytes of RAM that this end has dealt with as a source; 0 at a destination."""
        if self.migration is None:
            return 0
        ram = self.migration.state.counters
        return ram.normal_bytes + ram.duplicate_bytes

    def _moved(self) -> tuple[int, int] | None:
        """What the rate is of, and what is done with it; None where nothing tells."""
        if self._phase in ("load", "write", "device-state"):
            return self._done, self._done
        if (dealt := self._dealt()) and self.migration is not None:
            # Zeros are dealt with and hardly sent.
            return self.migration.state.counters.normal_bytes, dealt
        if self._phase == "round" and self._device is not None:
            received = counters(*self._device).get("port_rcv_bytes")
            return None if received is None else (received, 0)
        return None

    def look(self) -> Standing:
        """Return where it stands now."""
        now = time.monotonic()
        moved = self._moved()
        rate, pace = None, 0.0
        if moved is not None:
            if not self._samples or now - self._samples[-1][0] >= _LEAST:
                self._samples.append((now, *moved))
            while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW:
                self._samples.popleft()
            began, sent, dealt = self._samples[0]
            if now - began >= _LEAST and moved[0] >= sent:
                rate = (moved[0] - sent) / (now - began)
                pace = (moved[1] - dealt) / (now - began)
        done, total = self._amounts()
        on_link = self._phase in ("transfer", "round") and self._link
        state = self.migration.state if self.migration is not None else None
        return Standing(
            self._phase,
            round=self._done if self._phase == "round" else None,
            done=done,
            total=total,
            rate=rate,
            share=rate / self._link if rate is not None and on_link and self._link else None,
            dirty_rate=float(state.dirty_bytes_rate) if state and state.dirty_bytes_rate else None,
            expected_downtime=(
                state.expected_downtime / 1000 if state and state.expected_downtime else None
            ),
            left=(total - done) / pace if pace > 0 and total and done is not None else None,
        )

    def _amounts(self) -> tuple[int | None, int | None]:
        match self._phase:
            case "round":
                return None, None
            case "setup" if self._dealt():
                # RAM is on its way, and its event comes when a whole block was sent.
                return min(self._dealt(), self._ram_total), self._ram_total or None
            case "transfer":
                return max(self._done, min(self._dealt(), self._total)), self._total or None
        return self._done or None, self._total or None
