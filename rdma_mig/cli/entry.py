# SPDX-License-Identifier: Apache-2.0
"""Where ``rdma-migrate`` begins and ends.

A signal ends it quietly before anything else has been imported. Importing takes a tenth of a second
and more, in which nothing is under way that would have to be put in order. Python alone would
answer with a traceback from wherever it is.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Final

__all__ = ["command", "run"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
# ExitStatus.TIMED_OUT_OR_CANCELLED, which is not imported yet.
_CANCELLED: Final = 5


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"rdma-migrate: interrupted\n")
    os._exit(_CANCELLED)


def run() -> int:
    """Run the command line, and end the process; return its exit status where Python is to."""
    try:
        status = command()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        status = end.code
    _leave(status)
    return status


def command() -> int:
    """Run the command line; return its exit status, which no signal changes any more."""
    for number in _SIGNALS:
        signal.signal(number, _interrupted)
    from rdma_mig.cli.main import main

    status = 1
    try:
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        _keep(status)
    return status


def _leave(status: int) -> None:
    """End the process, unless Python has something left to do or to say.

    All has been closed by now. Taking the interpreter apart with some hundred modules would take
    as long as a small migration does.
    """
    import atexit
    import threading

    if sys.warnoptions or sys.flags.dev_mode:
        return  # whoever asks for them is to be warned of what was left open
    if threading.active_count() > 1 or sys.stdout is None or sys.stderr is None:
        return
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # Python tries again, and tells
    os._exit(status)


def _keep(status: int) -> None:
    """Let a signal that comes when all is done change nothing of how it ended."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        try:
            sys.stdout.flush()
        finally:
            os._exit(status)

    for number in _SIGNALS:
        signal.signal(number, leave)
