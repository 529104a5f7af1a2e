# SPDX-License-Identifier: Apache-2.0
"""A second process that keeps guest RAM for the case that this one is killed."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from rdma_mig.channel.link import wait_for
from rdma_mig.closing import Closing
from rdma_mig.errors import HostError, MigrationTimeout
from rdma_mig.snapshot.entrusted import DONE, READY, TAKEN, Entrusted
from rdma_mig.waits import Cancel, Deadline

__all__ = ["Custody"]

# Python starts within a fraction of a second, on an emulated processor within several. The source's
# guest runs meanwhile.
_START_SECONDS: Final = 30.0
# Of the guest's downtime; usually two milliseconds.
_TAKE_SECONDS: Final = 5.0
_END_SECONDS: Final = 5.0
_WHO: Final = "the process that guards guest RAM"


class Custody(Closing):
    """The process `rdma_mig.snapshot.custodian`, which finishes a snapshot if this one is killed.

    It is in a session of its own: what a terminal sends to this process does not reach it. It ends
    when this is closed, or this process ends.

    Args:
        partial: where the snapshot is written.

    Raises:
        HostError: it cannot be started.
    """

    def __init__(self, partial: Path) -> None:
        self._entrusted = False
        try:
            # -P: what lies in the working directory is no module of ours.
            command = [sys.executable, "-P", "-m", "rdma_mig.snapshot.custodian", str(partial)]
            self._channel, theirs = socket.socketpair()
        except OSError as error:
            raise _failed("cannot be started", error) from error
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            self._channel.close()
            raise _failed("cannot be started", error) from error

    def wait_ready(self, cancel: Cancel) -> None:
        """Wait until it can take something.

        Raises:
            HostError: it has ended instead, or does not start in time.
            MigrationCancelled: the wait was cancelled.
        """
        self._await(READY, cancel, _START_SECONDS, "start")

    def entrust(self, what: Entrusted, cancel: Cancel) -> None:
        """Hand the snapshot over: from here on RAM outlives this process.

        Raises:
            HostError: it could not be.
            MigrationCancelled: the wait was cancelled.
        """
        # Should it stop in between, it has some of it, and must not be told that all is done.
        self._channel.settimeout(_TAKE_SECONDS)
        try:
            what.send(self._channel)
        except OSError as error:
            raise _failed("takes nothing", error) from error
        self._await(TAKEN, cancel, _TAKE_SECONDS, "take RAM")
        self._entrusted = True

    def _await(self, word: bytes, cancel: Cancel, seconds: float, doing: str) -> None:
        try:
            wait_for(
                self._channel.fileno(), select.POLLIN, cancel, Deadline.after(seconds), doing, _WHO
            )
            heard = self._channel.recv(1)
        except (OSError, MigrationTimeout) as error:
            raise _failed(f"did not {doing} within {seconds:g} s", None) from error
        if heard != word:
            raise _failed(f"ended before it could {doing}", None)

    def close(self) -> None:
        """Say that this process ends in order, and wait for the other's end. Idempotent."""
        if self._channel.fileno() < 0:
            return
        with self._channel:
            if self._entrusted:
                with contextlib.suppress(OSError):
                    self._channel.sendall(DONE)
            else:
                # It has nothing, or was not heard to have it.
                self._process.kill()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_END_SECONDS)


def _failed(how: str, error: OSError | ValueError | None) -> HostError:
    reason = "" if error is None else f": {getattr(error, 'strerror', None) or error}"
    return HostError(f"{_WHO} {how}{reason}")
