# SPDX-License-Identifier: Apache-2.0
"""What SIGINT and SIGTERM do to a command."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["cancelled_by_signals", "interrupted_by_signals"]

# No signal has this number.
_END = 0

_Handler = Callable[[int, FrameType | None], object]


@contextlib.contextmanager
def _handled_by(interrupt: _Handler, terminate: _Handler) -> Iterator[None]:
    previous = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, interrupt), (signal.SIGTERM, terminate))
    }
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def interrupted_by_signals() -> contextlib.AbstractContextManager[None]:
    """Let both raise KeyboardInterrupt, wherever the command is."""
    # SIGTERM by way of SIGINT, which an event loop of asyncio knows how to deal with.
    return _handled_by(
        signal.default_int_handler, lambda _number, _frame: signal.raise_signal(signal.SIGINT)
    )


@contextlib.contextmanager
def cancelled_by_signals(cancel: Callable[[], object]) -> Iterator[None]:
    """Let both ask for the end, which what is under way then finds an orderly way to.

    What is given back behind it belongs within: a signal that comes when all is done must not
    change how it ended.

    Args:
        cancel: called for each of them, from another thread.
    """
    # A handler in Python runs in the main thread, once that is back from the system: a signal that
    # comes just before a wait begins neither ends the wait nor is handled until it ends. What the
    # interpreter writes to its wake-up descriptor is written at once.
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    interesting = {int(signal.SIGINT), int(signal.SIGTERM)}

    def watch() -> None:
        while _END not in (numbers := os.read(signals, 64)):
            if interesting.intersection(numbers):
                cancel()

    watcher = threading.Thread(target=watch, name="signals")
    try:
        watcher.start()
        before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        try:
            with _handled_by(_leave_to_watcher, _leave_to_watcher):
                yield
        finally:
            signal.set_wakeup_fd(before)
            # Not by the end of the pipe: a process that was forked meanwhile may have it too.
            os.set_blocking(wakeup, True)
            os.write(wakeup, bytes([_END]))
            watcher.join()
    finally:
        os.close(wakeup)
        os.close(signals)


def _leave_to_watcher(_number: int, _frame: FrameType | None) -> None:
    """Without a handler there would be no signal to be told of."""
