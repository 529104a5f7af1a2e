# SPDX-License-Identifier: Apache-2.0
"""One migration: its state, its worker thread, its cancellation, and who owns the VM."""

from __future__ import annotations

import atexit
import threading
import warnings
from collections.abc import Callable

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.closing import Closing
from rdma_mig.errors import LocalProtocolError, MigrationError
from rdma_mig.migration import notifiers
from rdma_mig.migration.events import Connected, MigrationEvent, Warned
from rdma_mig.migration.status import MigrationState, MigrationStatus, clock_ms
from rdma_mig.tracing import Observer
from rdma_mig.waits import Cancel

__all__ = [
    "Migration",
    "MigrationState",
    "MigrationStatus",
    "migrate_fd_close",
    "migrate_get_current",
]


_current_lock = threading.Lock()
_current = MigrationState()


def migrate_get_current() -> MigrationState:
    """Return what is known of, and set for, the process's one migration.

    There always is one, as in the header: before the first ``*_start_*`` it holds the settings
    only. Starting another migration puts a new object in its place, which keeps the settings.
    """
    return _current


def migrate_fd_close(s: MigrationState) -> int:
    """Close the file of a migration, as its cleanup does.

    Returns:
        0, or a negative number if the file was in error; 0 also where there is no file.
    """
    file, s.file = s.file, None
    if file is None:
        return 0
    file.close()
    return -int(file.error.exit_status) if file.error is not None else 0


class Migration(Closing):
    """Owns one migration: state, cancellation, and the one thread that touches the verbs objects.

    Args:
        on_event: called on the worker thread with what happens (rdma_mig.migration.events).
        trace: told in detail what happens; None for no trace. Closed by its owner, after this.
        state: settings; the defaults if None. It is this migration's from here on.

    The context manager cancels what still runs and waits for its end.
    """

    def __init__(
        self,
        on_event: Callable[[MigrationEvent], None] | None = None,
        trace: Observer | None = None,
        state: MigrationState | None = None,
    ) -> None:
        self.trace = trace
        self.state = MigrationState() if state is None else state
        self.state.migration = self
        # The status goes on, on the worker, or to cancelling, on any thread: one after the other.
        self._status_lock = threading.RLock()
        self.cancellation = Cancel()
        self._on_event = on_event
        self._worker: threading.Thread | None = None
        self._error: MigrationError | None = None
        self._given_up = False
        self._closed = False

    # ---- running ----

    @classmethod
    def of(cls, state: Migration | MigrationState) -> Migration:
        """Return the migration that a ``*_start_*`` function shall start.

        The header has a ``MigrationState`` there. One that was not migrated with is taken as it
        is, another one's settings are taken over. Such a migration needs no closing by its user.

        Raises:
            LocalProtocolError: the state's migration is under way.
        """
        global _by_header  # noqa: PLW0603 - as _current
        if isinstance(state, Migration):
            return state
        last = state.migration
        if last is not None:
            if last.running:
                raise LocalProtocolError("another migration is under way in this process")
            state = state.successor()
        with _current_lock:
            if _by_header is not None and not _by_header.running:
                _by_header.close()
            _by_header = cls(state=state)
            return _by_header

    def become_current(self) -> None:
        """Be the process's one migration, as the header's functions know only one.

        Raises:
            LocalProtocolError: another one is under way; ``Migration`` objects of one's own have
                no such limit when the transport is used without the header's functions.
        """
        global _current  # noqa: PLW0603 - the header's functions know one migration a process
        with _current_lock:
            other = _current.migration
            if other is not None and other is not self and other.running:
                raise LocalProtocolError("another migration is under way in this process")
            _current = self.state

    def run(self, work: Callable[[], None], name: str) -> None:
        """Start the worker thread on ``work``; what it raises is kept for wait()."""
        if self._worker is not None:
            raise LocalProtocolError("this migration has been started already")
        state = self.state
        state.total_time = clock_ms()
        state.status = MigrationStatus.SETUP
        state.cleanup_bh = self._clean_up
        self._worker = threading.Thread(target=self._guard, args=(work,), name=name)
        state.thread = self._worker
        self._worker.start()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            self._notify()
            work()
        except MigrationError as error:
            self.fail(error)
        except Exception as error:
            defect = MigrationError(
                f"unexpected {type(error).__name__}: {error}",
                remedy="this is a defect of rdma-mig: please report it with the output of "
                "RDMA_MIG_DEBUG=1",
            )
            defect.__cause__ = error
            self.fail(defect)
        finally:
            cleanup = self.state.cleanup_bh
            if cleanup is not None:
                cleanup()

    def _clean_up(self) -> None:
        """End the bookkeeping, on the worker: the final state is what everybody then sees."""
        state = self.state
        state.cleanup_bh = None
        migrate_fd_close(state)
        final = MigrationStatus.COMPLETED
        if self._error is not None:
            cancelled = self.cancellation.requested and not self._given_up
            final = MigrationStatus.CANCELLED if cancelled else MigrationStatus.FAILED
            self._error.owner = self._error.owner or state.owner
            self._error.step = self._error.step or state.step
        state.total_time = clock_ms() - state.total_time
        if final is MigrationStatus.COMPLETED:
            moved = state.counters.transferred
            state.mbps = moved * 8 / state.total_time / 1000 if state.total_time else -1.0
        if self.trace is not None:
            self.trace.record("end", status=str(final), message=str(self._error or ""))
        with self._status_lock:
            state.status = final
        self._notify()

    def _notify(self) -> None:
        """Tell the header's notifiers, if this is the migration that they are told of."""
        if _current is self.state:
            for problem in notifiers.notify(self.state):
                self.emit(Warned(problem))

    def connected(self, file: QEMUFile) -> None:
        """Note the stream, on the worker; the header has it in ``MigrationState.file``."""
        self.state.file = file
        self.state.counters = file.counters

    def advance(self, status: MigrationStatus) -> None:
        """Go on to a state, unless cancellation has begun."""
        with self._status_lock:
            if self.state.status is not MigrationStatus.CANCELLING:
                self.state.status = status

    @property
    def failure(self) -> str:
        """Why it has failed, one line; empty if it has not."""
        return "" if self._error is None else str(self._error)

    def fail(self, error: MigrationError) -> None:
        """Note why the migration fails; the first reason counts."""
        if self._error is None:
            self._error = error

    def give_up(self, error: MigrationError) -> None:
        """End it from outside of its worker: it has failed, and was not cancelled."""
        self._given_up = True
        self.fail(error)
        self.cancellation.request()

    @property
    def running(self) -> bool:
        """Whether the worker is at work."""
        return self._worker is not None and self._worker.is_alive()

    @property
    def is_worker(self) -> bool:
        """Whether the calling thread is the worker."""
        return threading.current_thread() is self._worker

    def cancel(self) -> None:
        """Ask for the end: from any thread, at any time, also from a signal handler."""
        with self._status_lock:
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
        if isinstance(event, Connected) and self.trace is not None:
            self.trace.record(
                "connected",
                peer=event.peer,
                local=event.local,
                device=event.device,
                transport=event.transport,
                pin_all=event.pin_all,
            )
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


_by_header: Migration | None = None
"""The migration that `Migration.of` made last: nobody else closes it."""


@atexit.register
def _close_last() -> None:
    if _by_header is not None:
        _by_header.close()
