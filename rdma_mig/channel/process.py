# SPDX-License-Identifier: Apache-2.0
"""The standard input or output of a command that the shell runs (``exec:COMMAND``)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess

from rdma_mig.channel.link import DescriptorLink, wait_for
from rdma_mig.errors import HostError, MigrationError, PeerGone
from rdma_mig.waits import Cancel, Deadline, TransportLimits

__all__ = ["ProcessLink"]

# How long a command may take to end after its stream has, unless a limit was given.
_EXIT_SECONDS = 60.0
_PIPE_SIZE = 1 << 20
# How long the kernel may take to end what was killed: a disk that hangs can hold it.
_KILLED_SECONDS = 5.0


class ProcessLink(DescriptorLink):
    """A command and the pipe to it or from it; closing this ends the command.

    Args:
        command: for ``/bin/sh -c``; what it says on standard error goes to ours.
        reading: the stream is its output; else its input.
        cancel, limits: as for `Link`.

    Raises:
        HostError: it cannot be started.
    """

    kind = "exec"

    def __init__(
        self, command: str, *, reading: bool, cancel: Cancel, limits: TransportLimits
    ) -> None:
        ours, theirs = os.pipe() if reading else os.pipe()[::-1]
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL if reading else theirs,
                stdout=theirs if reading else subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            os.close(ours)
            raise HostError(f"{command!r} cannot be started: {error}") from None
        finally:
            os.close(theirs)
        os.set_blocking(ours, False)
        with contextlib.suppress(OSError):  # larger is faster, and has a limit for users
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        super().__init__(ours, cancel, limits, f"command {command[:80]!r}")
        self._writes = not reading

    def finish(self) -> str:
        """Wait for its end, which has to be exit status 0."""
        if self._writes:
            super().close()  # the end of its input
        deadline = self.limits.total.sooner(Deadline.after(self.limits.stall or _EXIT_SECONDS))
        pidfd = os.pidfd_open(self._process.pid)
        try:
            wait_for(pidfd, select.POLLIN, self.cancel, deadline, "its end", self.peer)
        finally:
            os.close(pidfd)
        if self._process.wait():
            raise self._failed()
        return f"{self.peer} ended with status 0"

    def _failed(self) -> MigrationError:
        return PeerGone(
            f"{self.peer} ended {_how(self._process.returncode)}",
            remedy="what it said on standard error tells why",
        )

    def read(self, doing: str) -> bytes:
        """Wait for bytes of its output; at the end it must have done well.

        A command that fails ends its output as one that is through does.
        """
        data = super().read(doing)
        if not data:
            self.finish()
        return data

    def write(self, data: bytes | memoryview, doing: str) -> None:
        """Hand over all of ``data``."""
        try:
            super().write(data, doing)
        except PeerGone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._process.wait(0.5):
                    raise self._failed() from None
            raise

    def close(self) -> None:
        """Close the pipe, and end the command if it still runs. Idempotent."""
        super().close()
        if self._process.poll() is None:
            # Its group is its own: what it has started ends with it.
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.5)
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILLED_SECONDS)


def _how(status: int) -> str:
    if status < 0:
        return f"by signal {-status} ({signal.strsignal(-status)})"
    return f"with status {status}"
