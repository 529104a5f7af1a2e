# SPDX-License-Identifier: Apache-2.0
"""Who is told in detail what a migration does, as it does it.

The trace is one of them: each record is in its file before what the record tells of goes on.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Protocol

from rdma_mig import _mapped
from rdma_mig.closing import Closing
from rdma_mig.errors import UsageError
from rdma_mig.wire.trace import encode_record

__all__ = ["LONG_WAIT", "TRACE_VERSION", "Observer", "Observers", "Trace"]

TRACE_VERSION = 2
LONG_WAIT = 0.1
"""A wait of so many seconds is a record of its own."""


class Observer(Protocol):
    """Is told of each record, on the thread that does what it tells of; it must not raise."""

    def record(self, kind: str, *, now: float | None = None, **fields: Any) -> None:
        """Take a record; its fields are those that rdma_mig.wire.trace has for the kind.

        ``now`` is of time.monotonic(), where that was looked at a moment ago.
        """
        ...

    def waited(self, awaited: str, began: float, now: float) -> None:
        """Take note of a wait: when it began and when it was over, of time.monotonic()."""
        ...


class Observers:
    """Several observers in the place of one; they are their owners' to close."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    @classmethod
    def of(cls, *observers: Observer | None) -> Observer | None:
        """Return what stands for those that are there: None, the only one, or all."""
        present = [observer for observer in observers if observer is not None]
        if len(present) < 2:
            return present[0] if present else None
        return cls(*present)

    def record(self, kind: str, *, now: float | None = None, **fields: Any) -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.record(kind, now=now, **fields)

    def waited(self, awaited: str, began: float, now: float) -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.waited(awaited, began, now)


class Trace(Closing):
    """A trace file; used from any thread.

    Nothing is kept back: after SIGKILL the file has every record up to the last event. A regular
    file is written through its mapping, without a system call for each record; until the trace is
    closed it is longer than its content, and zeros follow. Anything else gets one write() a
    record. A file that cannot be written any more ends the trace and not the migration.

    Args:
        path: made with mode 0600; a regular file is begun anew, a FIFO or device is written to. A
            FIFO must have a reader, and one that is full ends the trace: nobody waits for it.
        role: "incoming" or "outgoing".

    Attributes:
        failure: why the trace has ended early; empty as long as it has not.

    Raises:
        UsageError: it cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], role: str) -> None:
        self._fd = -1
        self._mapped: _mapped.MappedFile | None = None
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self.failure = ""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
        flags |= os.O_NONBLOCK
        try:
            self._fd = os.open(Path(path), flags, 0o600)
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                # What others left readable may not get to know who migrates what.
                os.fchmod(self._fd, 0o600)
                os.ftruncate(self._fd, 0)
                self._map()
        except OSError as error:
            self.close()
            raise UsageError(
                f"the trace cannot be written to {os.fspath(path)}: {error.strerror}",
                remedy="name another file with --trace",
            ) from error
        self.record("begin", version=TRACE_VERSION, role=role, clock=time.time())

    def _map(self) -> None:
        """Write the file through its mapping from now on, where its file system lets us."""
        try:
            readable = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return  # it may be written and not read
        try:
            self._mapped = _mapped.MappedFile(readable)
        except OSError:
            os.close(readable)
            os.ftruncate(self._fd, 0)
        else:
            os.close(self._fd)
            self._fd = readable

    def record(self, kind: str, *, now: float | None = None, **fields: Any) -> None:
        """Write a record; its fields are those that rdma_mig.wire.trace has for the kind."""
        line = encode_record((now or time.monotonic()) - self._began, kind, fields)
        with self._lock:
            if self._fd < 0:
                return
            try:
                self._append(line)
            except OSError as error:
                self.failure = error.strerror or str(error)
                self._close()

    def _append(self, line: bytes) -> None:
        if self._mapped is not None:
            self._mapped.append(line)
            return
        written = os.write(self._fd, line)
        while written < len(line):
            written += os.write(self._fd, line[written:])

    def waited(self, awaited: str, began: float, now: float) -> None:
        """Record a wait, if it was a long one."""
        if now - began >= LONG_WAIT:
            self.record("wait", now=now, awaited=awaited, seconds=round(now - began, 6))

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            with contextlib.suppress(OSError):
                mapped.close()
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def close(self) -> None:
        """Close the file; records are ignored from now on. Idempotent."""
        with self._lock:
            self._close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn("unclosed Trace", ResourceWarning, stacklevel=2)
            self.close()
