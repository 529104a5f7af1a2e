# SPDX-License-Identifier: Apache-2.0
"""One migration: its state, its worker thread, its cancellation, and who owns the VM."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from rdma_mig.closing import Closing
from rdma_mig.errors import LocalProtocolError, MigrationError
from rdma_mig.migration.events import MigrationEvent
from rdma_mig.tracing import Trace
from rdma_mig.waits import Cancel

__all__ = ["Migration", "MigrationState", "MigrationStatus", "migrate_get_current"]


class MigrationStatus(StrEnum):
    """States of a migration, named as QEMU's ``query-migrate`` names them."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class MigrationState:
    """What migration.h's ``struct MigrationState`` says of a migration, as far as it is filled.

    Attributes:
        status: where it stands.
        setup_seconds: populating and registering memory.
        total_seconds: from the connection to the end.
        rounds: registration phases after setup, the last one included.
        bytes_transferred: RAM bytes posted as RDMA writes; a destination does not see the
            writes, and counts the RAM that it received once.
        owner: who owns the virtual machine should the migration fail now; one clause.
        step: what the migration is at, for messages; a participle: "receiving device state".
    """

    status: MigrationStatus = MigrationStatus.NONE
    setup_seconds: float = 0.0
    total_seconds: float = 0.0
    rounds: int = 0
    bytes_transferred: int = 0
    owner: str = ""
    step: str = ""
    started: float = field(default=0.0, repr=False)


_current_lock = threading.Lock()
_current: Migration | None = None


def migrate_get_current() -> Migration | None:
    """Return the migration that this process started last through ``rdma_start_*``."""
    return _current


class Migration(Closing):
    """Owns one migration: state, cancellation, and the one thread that touches the verbs objects.

    Args:
        on_event: called on the worker thread with what happens (rdma_mig.migration.events).
        trace: told in detail what happens; None for no trace. Closed by its owner, after this.

    The context manager cancels what still runs and waits for its end.
    """

    def __init__(
        self,
        on_event: Callable[[MigrationEvent], None] | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.trace = trace
        self.state = MigrationState()
        self.cancellation = Cancel()
        self._on_event = on_event
        self._worker: threading.Thread | None = None
        self._error: MigrationError | None = None
        self._closed = False

    # ---- running ----

    def become_current(self) -> None:
        """Be the process's one migration, as the header's functions know only one.

        Raises:
            LocalProtocolError: another one is under way; ``Migration`` objects of one's own have
                no such limit when the transport is used without the header's functions.
        """
        global _current  # noqa: PLW0603 - the header's functions know one migration a process
        with _current_lock:
            if _current is not None and _current is not self and _current.running:
                raise LocalProtocolError("another migration is under way in this process")
            _current = self

    def run(self, work: Callable[[], None], name: str) -> None:
        """Start the worker thread on ``work``; what it raises is kept for wait()."""
        if self._worker is not None:
            raise LocalProtocolError("this migration has been started already")
        self.state.started = time.monotonic()
        self.state.status = MigrationStatus.SETUP
        self._worker = threading.Thread(target=self._guard, args=(work,), name=name)
        self._worker.start()

    def _guard(self, work: Callable[[], None]) -> None:
        state = self.state
        try:
            work()
            state.status = MigrationStatus.COMPLETED
        except MigrationError as error:
            self._error = error
        except Exception as error:
            self._error = MigrationError(
                f"unexpected {type(error).__name__}: {error}",
                remedy="this is a defect of rdma-mig: please report it with the output of "
                "RDMA_MIG_DEBUG=1",
            )
            self._error.__cause__ = error
        finally:
            state.total_seconds = time.monotonic() - state.started
        if self._error is not None:
            cancelled = self.cancellation.requested
            state.status = MigrationStatus.CANCELLED if cancelled else MigrationStatus.FAILED
            self._error.owner = self._error.owner or state.owner
            self._error.step = self._error.step or state.step
        if self.trace is not None:
            self.trace.record("end", status=str(state.status), message=str(self._error or ""))

    @property
    def running(self) -> bool:
        """Whether the worker is at work."""
        return self._worker is not None and self._worker.is_alive()

    def cancel(self) -> None:
        """Ask for the end: from any thread, at any time, also from a signal handler."""
        if self.state.status in (
            MigrationStatus.SETUP,
            MigrationStatus.ACTIVE,
            MigrationStatus.DEVICE,
        ):
            self.state.status = MigrationStatus.CANCELLING
        self.cancellation.request()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the worker; return whether it has ended.

        Raises:
            MigrationError: why the migration failed.
        """
        if self._worker is not None:
            self._worker.join(seconds)
            if self._worker.is_alive():
                return False
        if self._error is not None:
            raise self._error
        return True

    def emit(self, event: MigrationEvent) -> None:
        """Tell whoever follows this migration."""
        if self._on_event is not None:
            self._on_event(event)

    def note_round(self, *, last: bool) -> None:
        """Count a RAM phase after setup."""
        self.state.rounds += 1
        if self.trace is not None:
            self.trace.record("round", number=self.state.rounds, last=last)

    def note_commit(self, role: str, by: str, state: str) -> None:
        """Put the commit point into the trace (docs/reliability.md, trace).

        Args:
            role: "source" or "destination".
            by: what hands the virtual machine over: "READY", "SHUT", "FINAL_ACK", "EOF".
            state: "before" it is sent, or "passed".
        """
        if self.trace is not None:
            self.trace.record("commit", role=role, by=by, state=state)

    # ---- the end ----

    def close(self) -> None:
        """Cancel what runs, wait for its end, give everything back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self.running:
            self.cancel()
        if self._worker is not None:
            self._worker.join()
        self.cancellation.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn("unclosed Migration", ResourceWarning, stacklevel=2)
            self.cancellation.request()
