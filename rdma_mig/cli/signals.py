# SPDX-License-Identifier: Apache-2.0
"""What SIGINT and SIGTERM do to a command."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["cancelled_by_signals", "interrupted_by_signals"]

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


def cancelled_by_signals(cancel: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    """Let both ask for the end, which what is under way then finds an orderly way to.

    What is given back behind it belongs within: a signal that comes when all is done must not
    change how it ended.
    """

    def ask(_number: int, _frame: FrameType | None) -> None:
        cancel()

    return _handled_by(ask, ask)
