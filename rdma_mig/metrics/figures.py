# SPDX-License-Identifier: Apache-2.0
"""The figures of one migration, gathered from its records and events as they come."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from rdma_mig.errors import MigrationError
from rdma_mig.migration.events import Completed, Connected, MigrationEvent, Warned
from rdma_mig.migration.state import Migration

__all__ = ["Figures"]


class Figures:
    """An observer of a migration (rdma_mig.tracing) that counts; read from any thread.

    Attributes:
        messages: control messages by (direction, channel, type); direction is "sent" or "received".
        errors: failures by kind: the name of the error's class.
        warnings: told so far.
        rounds: RAM phases behind setup.
        registrations, registration_seconds: of memory, and what they took.
        registered_bytes: registered now.
        populate_seconds: what populating the guest's memory took.
        writes, written_bytes: RDMA writes posted, and their bytes.
        wait_seconds: of waits that were over.
        last_phase_at, ended_at: of time.monotonic(): when the last RAM phase was announced (at a
            source: had ended), and when all was over; None before.
        connected, completed: what was told then; None before.
        migration: whose state is read; None before follow().
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.messages: Counter[tuple[str, str, str]] = Counter()
        self.errors: Counter[str] = Counter()
        self.warnings = 0
        self.rounds = 0
        self.registrations = 0
        self.registration_seconds = 0.0
        self.registered_bytes = 0
        self.populate_seconds = 0.0
        self.writes = 0
        self.written_bytes = 0
        self.wait_seconds = 0.0
        self.last_phase_at: float | None = None
        self.ended_at: float | None = None
        self.connected: Connected | None = None
        self.completed: Completed | None = None
        self.migration: Migration | None = None

    def __enter__(self) -> Figures:
        """Hold the figures still while they are read."""
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    # ---- what it is told ----

    def record(self, kind: str, *, now: float | None = None, **fields: Any) -> None:
        """Count a record."""
        with self._lock:
            match kind:
                case "out" | "in":
                    direction = "sent" if kind == "out" else "received"
                    self.messages[direction, fields["channel"], fields["type"]] += 1
                case "register":
                    self.registrations += 1
                    self.registration_seconds += fields["seconds"]
                    self.registered_bytes += fields["bytes"]
                case "deregister":
                    self.registered_bytes -= fields["bytes"]
                case "populate":
                    self.populate_seconds += fields["seconds"]
                case "write":
                    self.writes += fields["writes"]
                    self.written_bytes += fields["bytes"]
                case "round":
                    self.rounds = fields["number"]
                    if fields["last"]:
                        self.last_phase_at = now or time.monotonic()
                case "end":
                    self.ended_at = now or time.monotonic()

    def waited(self, awaited: str, began: float, now: float) -> None:
        """Add up a wait."""
        with self._lock:
            self.wait_seconds += now - began

    def event(self, event: MigrationEvent) -> None:
        """Take note of an event."""
        with self._lock:
            match event:
                case Connected():
                    self.connected = event
                case Completed():
                    self.completed = event
                case Warned():
                    self.warnings += 1

    def failed(self, error: MigrationError) -> None:
        """Count a failure."""
        with self._lock:
            self.errors[type(error).__name__] += 1
