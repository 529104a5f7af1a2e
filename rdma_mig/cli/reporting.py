# SPDX-License-Identifier: Apache-2.0
"""How a running migration is shown: lines for people, or one JSON object a line."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

from rdma_mig.cli.progress import terminal_display, words_of
from rdma_mig.errors import MigrationError, UsageError
from rdma_mig.metrics.meter import Meter
from rdma_mig.migration.events import (
    Completed,
    Connected,
    Listening,
    MigrationEvent,
    Progress,
    Warned,
)
from rdma_mig.migration.state import Migration
from rdma_mig.tracing import Trace
from rdma_mig.words import size_of

__all__ = ["Reporter", "drive", "tracing_to"]

_INTERVAL = 1.0
# Addresses at which a source is awaited; elsewhere something is read that is there already.
_AWAITED = ("rdma:", "tcp:", "unix:")


class Reporter:
    """Prints events. Its output may fail (a closed pipe); the migration goes on all the same.

    Args:
        as_json: one JSON object a line on standard output.
        quiet: neither progress nor summary.
        verbose: also says over which device and with whom.
        ready_fd: descriptor that the listening address is written to, then closed; None for none.
        out: where summaries and JSON go; None for standard output.
    """

    def __init__(
        self,
        *,
        as_json: bool,
        quiet: bool,
        verbose: bool,
        ready_fd: int | None = None,
        out: TextIO | None = None,
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._json = as_json
        self._quiet = quiet
        self._verbose = verbose
        self._ready_fd = ready_fd
        self._phase = ""
        self._last = 0.0
        self._meter = Meter()
        self._display = None if as_json or quiet else terminal_display(self._meter)
        if self._display is not None:
            # Whatever ends the command: a terminal is left with its cursor.
            atexit.register(self.close)
        if ready_fd is not None:
            try:
                os.fstat(ready_fd)
            except (OSError, OverflowError):
                raise UsageError(f"--ready-fd {ready_fd} is not an open descriptor") from None

    def __call__(self, event: MigrationEvent) -> None:
        """Show one event; called on the migration's thread."""
        self._meter.event(event)
        if isinstance(event, Listening):
            self._ready(event.uri)
        try:
            if self._json:
                self._print_json(event.as_json())
            else:
                self._show(event)
        except (OSError, ValueError):
            # Nobody reads any more. That is no reason to lose a virtual machine.
            self._quiet = True

    def follow(self, migration: Migration) -> None:
        """Look at this migration's counters between its events."""
        self._meter.migration = migration

    def close(self) -> None:
        """Leave a terminal's line as it is, for what is printed next. Idempotent."""
        if self._display is not None:
            with contextlib.suppress(OSError, ValueError):
                self._display.stop()

    def warn(self, message: str) -> None:
        """Show a warning that no migration event stands for."""
        self(Warned(message))

    def failed(self, error: MigrationError) -> None:
        """Add the failure to the JSON events."""
        self.close()
        if self._json:
            try:
                self._print_json(
                    {
                        "event": "failed",
                        "message": error.message,
                        "step": error.step,
                        "owner": error.owner,
                        "remedy": error.remedy,
                        "exit_status": int(error.exit_status),
                    }
                )
            except (OSError, ValueError):
                self._quiet = True

    def _print_json(self, event: dict[str, Any]) -> None:
        print(json.dumps(event), file=self._out, flush=True)

    def _ready(self, uri: str) -> None:
        fd, self._ready_fd = self._ready_fd, None
        if fd is not None:
            try:
                os.write(fd, f"{uri}\n".encode())
                os.close(fd)
            except OSError as error:
                print(f"rdma-migrate: --ready-fd {fd}: {error.strerror}", file=sys.stderr)

    def _show(self, event: MigrationEvent) -> None:
        match event:
            case Listening():
                what = "listening on" if event.uri.startswith(_AWAITED) else "reading"
                print(f"{what} {event.uri}", file=self._out, flush=True)
            case Connected() if self._verbose:
                pinned = "all RAM pinned" if event.pin_all else "RAM pinned as it is used"
                over = f"{event.device}, {pinned}" if event.device else event.transport
                if event.connections > 1:
                    over += f", {event.connections} connections"
                self._note(f"connected with {event.peer} over {over}")
                self._note(f"route: {event.route()}")
            case Warned():
                print(f"rdma-migrate: warning: {event.message}", file=sys.stderr, flush=True)
            case Progress() if not self._quiet:
                self._progress(event)
            case Completed() if not self._quiet:
                self.close()
                self._summary(event)
            case _ if not self._quiet and (text := event.text()):
                self._note(text)

    def note(self, text: str) -> None:
        """Say something beside what is asked for, unless nothing is to be said."""
        if not self._quiet:
            with contextlib.suppress(OSError, ValueError):
                self._note(text)

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _progress(self, event: Progress) -> None:
        if self._display is not None:
            self._display.start()
            return
        now = time.monotonic()
        if event.phase == self._phase and now - self._last < _INTERVAL:
            return
        self._phase, self._last = event.phase, now
        self._note(words_of(self._meter.look()))

    def _summary(self, event: Completed) -> None:
        incoming = event.normal_pages + event.duplicate_pages == 0
        how = f"in {event.writes} writes" if event.writes else "in the stream"
        moved = (
            f"{size_of(event.bytes)} of RAM ({event.pages} pages), of it "
            f"{size_of(event.nonzero_bytes)} not zero"
            if incoming
            else f"{size_of(event.bytes)} ({event.pages} pages) {how}"
        )
        disk = "writing" if incoming else "loading"
        lines = [
            f"{'received from' if incoming else 'sent to'} {event.peer}: {moved}",
            f"  device state  {size_of(event.device_state_bytes)}",
            f"  rounds        {event.rounds}",
            f"  setup         {event.setup_seconds:.3f} s",
            f"  transfer      {event.transfer_seconds:.3f} s ({size_of(event.bytes_per_second)}/s)",
            f"  {disk}       {event.writing_seconds:.3f} s",
            f"  snapshot      {event.path}",
            f"  confirmed     {event.confirmed}",
        ]
        print("\n".join(lines), file=self._out, flush=True)


@contextlib.contextmanager
def tracing_to(path: str | None, role: str, reporter: Reporter) -> Iterator[Trace | None]:
    """Open the file of --trace, and say at the end when it is not whole; None without one."""
    if path is None:
        yield None
        return
    with Trace(path, role) as trace:
        try:
            yield trace
        finally:
            if trace.failure:
                reporter.warn(f"the trace in {path} ends early: {trace.failure}")


class Failing(Protocol):
    """Is told of a failure."""

    def failed(self, error: MigrationError) -> None:
        """Take note of why it failed."""
        ...


def drive(migration: Migration, reporter: Failing, start: Callable[[], object]) -> int:
    """Run a migration to its end.

    Args:
        migration: may be cancelled meanwhile.
        reporter: told of a failure.
        start: does what precedes the wait, in this thread.

    Returns:
        exit status 0.

    Raises:
        MigrationError: why it failed.
    """
    try:
        start()
        # In steps, so that a signal's handler runs soon whatever the platform's join() does.
        while not migration.wait(0.5):
            pass
    except MigrationError as error:
        reporter.failed(error)
        raise
    return 0
