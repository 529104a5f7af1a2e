# SPDX-License-Identifier: Apache-2.0
"""A QEMU that is started for a restore; it ends when that fails, and runs on when it does not."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from rdma_mig.closing import Closing
from rdma_mig.errors import HostError, MigrationCancelled, MigrationError, UsageError
from rdma_mig.manager.command import CommandLine
from rdma_mig.waits import Cancel

__all__ = ["SpawnedQemu", "require_free_sockets"]

_START_SECONDS = 20.0
_POLL_SECONDS = 0.02
_END_SECONDS = 2.0
_LAST_WORDS_SECONDS = 0.5
_SHOWN = 2000
# In /proc/net/unix: __SO_ACCEPTCON, somebody listens.
_LISTENS = 0x10000


def _listeners() -> set[str]:
    """Return the paths of unix sockets that somebody listens on."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
            words = line.split(maxsplit=7)
            if len(words) == 8 and int(words[3], 16) & _LISTENS:
                found.add(words[7])
    return found


def require_free_sockets(line: CommandLine) -> None:
    """Make sure that no QEMU listens at a socket of this command line: a new one would take it.

    Raises:
        UsageError: one does.
    """
    text = "\n".join(line.arguments)
    for path in sorted(_listeners()):
        if path.startswith("/") and re.search(rf"(?<=[:=]){re.escape(path)}(?=,|$)", text, re.M):
            raise UsageError(
                f"the QEMU that the command is of still listens at {path}",
                remedy="end it first: two guests would write to one disk; or start another one "
                "(--spawn)",
            )


class SpawnedQemu(Closing):
    """A QEMU process; closing it ends it, unless it was released.

    Args:
        line: how it is started; a QMP socket of its own is added where it has none.
        cancel: ends the wait for its socket.

    Attributes:
        qmp: the path of its QMP socket.

    Raises:
        HostError: it cannot be started.
        MigrationError: it ended at once; with what it said.
        MigrationCancelled: the end was asked for.
    """

    def __init__(self, line: CommandLine, cancel: Cancel) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="rdma-migrate-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._released = False
        self.log = self._directory / "log"
        own = line.qmp_socket()
        if own is None:
            own = str(self._directory / "qmp")
            line = line.reachable(own)
        self.qmp = os.path.join(line.directory, own)
        #: As /proc has it: relative where it was said so.
        self._bound = own
        try:
            if self.qmp in _listeners():
                raise UsageError(
                    f"another QEMU listens at {self.qmp}", remedy="name another socket (-qmp)"
                )
            self._start(line)
            self._await_socket(cancel)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def _start(self, line: CommandLine) -> None:
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    line.arguments,
                    cwd=line.directory or None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            raise HostError(
                f"{line.arguments[0][:200]} cannot be started: {error}",
                remedy="check the program and the directory",
            ) from None

    def _await_socket(self, cancel: Cancel) -> None:
        assert self._process is not None
        end = time.monotonic() + _START_SECONDS
        while self._bound not in _listeners():
            if self._process.poll() is not None:
                raise MigrationError(
                    f"the QEMU that was started has ended: {self.words() or 'without a word'}",
                    remedy="mend its command",
                )
            if time.monotonic() > end:
                raise MigrationError(
                    f"the QEMU that was started has no QMP socket after {_START_SECONDS:g} s: "
                    f"{self.words() or 'it says nothing'}",
                    remedy="see that its -qmp is unix:PATH,server=on,wait=off",
                )
            cancel.check("a QEMU was started")
            cancel.wait(_POLL_SECONDS)

    def words(self) -> str:
        """Return what it has said last, in one line."""
        try:
            raw = self.log.read_bytes()[-_SHOWN:]
        except OSError:
            return ""
        lines = [line.strip() for line in raw.decode("utf-8", "replace").splitlines()]
        return "; ".join([line for line in lines if line][-3:])

    def end_of(self, error: MigrationError) -> MigrationError | None:
        """Return what says more of a failure, if it came of this process's own end; else None.

        Args:
            error: how that was noticed.
        """
        assert self._process is not None
        if isinstance(error, (UsageError, MigrationCancelled)):
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS_SECONDS)
        words = self.words()
        if self._process.returncode is None or not words or words in error.message:
            return None
        return MigrationError(
            f"the QEMU that was started has ended: {words}",
            owner="the snapshot is unchanged",
            remedy="mend its command: the machine and the devices have to be those of the snapshot",
            step=error.step,
        )

    def release(self) -> None:
        """Let it run on behind this process's end."""
        self._released = True

    def close(self) -> None:
        """End it, and remove what was made for it; not after release(). Idempotent."""
        process, self._process = self._process, None
        if self._released:
            if process is not None:
                process.returncode = 0  # it is nobody's to wait for here
            return
        if process is not None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
