# SPDX-License-Identifier: Apache-2.0
"""A QEMU's QMP socket, with the qemu.qmp library: every command has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from rdma_mig.closing import Closing
from rdma_mig.errors import (
    HostError,
    MigrationCancelled,
    MigrationError,
    MigrationTimeout,
    PeerGone,
    RemoteProtocolError,
)
from rdma_mig.manager.process import QemuProcess
from rdma_mig.waits import Cancel, Deadline

__all__ = ["Monitor", "QemuRefused"]

_T = TypeVar("_T")

_GREETING_SECONDS = 5.0
_COMMAND_SECONDS = 10.0
_CLOSE_SECONDS = 1.0
# Between the end of a QEMU's socket and that of the process lie its last words.
_LAST_WORDS_SECONDS = 0.3
_START = "start QEMU with -qmp unix:PATH,server=on,wait=off, and name that path"


class QemuRefused(MigrationError):
    """QEMU answered a command with an error.

    Attributes:
        words: what it said.
    """

    def __init__(self, name: str, command: str, words: str) -> None:
        super().__init__(f"{name} refused {command}: {words}")
        self.words = words


def _library() -> Any:
    try:
        import qemu.qmp
    except ImportError:
        raise HostError(
            "driving a QEMU needs the library qemu.qmp",
            remedy="it is the extra `qmp`: pip install 'rdma-mig[qmp]', or pip install qemu.qmp",
        ) from None
    # What it logs is said in our errors; without a handler Python would print it.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    return qemu.qmp


class Monitor(Closing):
    """A connection with a QMP socket.

    Args:
        path: of the socket.
        cancel: ends the wait for an answer.

    Attributes:
        name: the QEMU, for messages.
        process: of the QEMU; None where it cannot be seen.

    Raises:
        HostError: the library is missing, or nobody listens there.
        RemoteProtocolError: what listens there does not speak QMP.
        MigrationTimeout, MigrationCancelled: no greeting came.
    """

    def __init__(self, path: str, cancel: Cancel) -> None:
        self.path = path
        self.name = f"the QEMU at {path}"
        self.process: QemuProcess | None = None
        self._cancel = cancel
        self._qmp = _library()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._loop = asyncio.new_event_loop()
        self._client = self._qmp.QMPClient()
        self._connected = False
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        self._socket.setblocking(False)
        try:
            self._await_place()
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise HostError(
                f"no QEMU at the QMP socket {self.path}: {why}", remedy=_START
            ) from None
        self.process = QemuProcess.behind(self._socket)
        try:
            self._run(self._client.connect(self._socket), _GREETING_SECONDS, self._cancel)
        except TimeoutError:
            raise self._silent() from None
        except (self._qmp.QMPError, EOFError, OSError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RemoteProtocolError(
                f"{self.path} is no QMP socket: {why}",
                remedy="a human monitor (-monitor) is none; " + _START,
            ) from None
        self._connected = True

    def _await_place(self) -> None:
        """Connect the socket. One with a full queue of clients is nothing that poll() waits for."""
        deadline = Deadline.after(_GREETING_SECONDS)
        while code := self._socket.connect_ex(self.path):
            if code != errno.EAGAIN:
                raise OSError(code, os.strerror(code))
            if deadline.passed:
                raise self._silent()
            self._cancel.wait(0.05)
            self._cancel.check(f"connecting to {self.name}")

    def _silent(self) -> MigrationTimeout:
        return MigrationTimeout(
            f"no QMP greeting from {self.path} within {_GREETING_SECONDS:g} s",
            remedy="a QMP socket serves one client at a time: end the other one (ss -xp shows it), "
            "or give QEMU a second -qmp socket",
        )

    def _run(self, work: Coroutine[Any, Any, _T], seconds: float, cancel: Cancel | None) -> _T:
        """Run to its end; TimeoutError and MigrationCancelled when that does not come."""
        return self._loop.run_until_complete(self._race(work, seconds, cancel))

    async def _race(
        self, work: Coroutine[Any, Any, _T], seconds: float, cancel: Cancel | None
    ) -> _T:
        task = asyncio.ensure_future(work)
        stop: asyncio.Future[Any] = self._loop.create_future()
        waited: set[asyncio.Future[Any]] = {task, stop}

        def cancelled() -> None:
            if not stop.done():
                stop.set_result(None)

        if cancel is not None:
            self._loop.add_reader(cancel.fileno(), cancelled)
        try:
            await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if cancel is not None:
                self._loop.remove_reader(cancel.fileno())
        if not task.done():
            task.cancel()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await task
            if stop.done():
                raise MigrationCancelled(f"cancelled while {self.name} was asked")
            raise TimeoutError
        return task.result()

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        seconds: float = _COMMAND_SECONDS,
        cancellable: bool = True,
    ) -> Any:
        """Execute a command, and return its result.

        Args:
            command: its name.
            arguments: its arguments.
            seconds: how long the answer may take.
            cancellable: whether a cancellation ends the wait; what undoes something is not, and is
                not tried on a QEMU whose process is stopped.

        Raises:
            QemuRefused: QEMU answered with an error.
            PeerGone: the socket was closed: QEMU has ended.
            MigrationTimeout: no answer came, or none can come.
            MigrationCancelled: the end was asked for.
        """
        if not cancellable and self.process is not None and self.process.stopped:
            raise MigrationTimeout(
                f"{self.name} answers nothing: its process is stopped",
                remedy=f"let it go on (kill -CONT {self.process.pid}), then `info status` there",
            )
        try:
            return self._run(
                self._client.execute(command, arguments),
                seconds,
                self._cancel if cancellable else None,
            )
        except self._qmp.ExecuteError as error:
            raise QemuRefused(self.name, command, str(error)) from None
        except TimeoutError:
            raise MigrationTimeout(
                f"no answer to {command} from {self.name} within {seconds:g} s",
                remedy="see whether it is stopped or busy (ps, top), and try again",
            ) from None
        except (self._qmp.QMPError, EOFError, OSError):
            raise self._gone() from None

    def _gone(self) -> PeerGone:
        self._connected = False
        time.sleep(_LAST_WORDS_SECONDS)
        words = self.words()
        return PeerGone(
            f"{self.name} is gone" + (f", its last words: {words}" if words else ""),
            remedy="" if words else "its own messages (standard error) say why",
        )

    @property
    def connected(self) -> bool:
        """Whether the QEMU was there when it was asked last."""
        return self._connected

    def words(self) -> str:
        """Return what QEMU has said on standard error since the connection, where readable."""
        return self.process.words() if self.process else ""

    def give(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of a descriptor, under a name for ``fd:NAME``.

        Raises: as execute().
        """
        try:
            self._client.send_fd_scm(fd)
        except (self._qmp.QMPError, EOFError, OSError):
            raise self._gone() from None
        self.execute("getfd", {"fdname": name})

    def close(self) -> None:
        """Disconnect, so that the next client is served. Idempotent."""
        if self._loop.is_closed():
            return
        # The connection may be gone by now, and the library reports that again here.
        with contextlib.suppress(Exception):
            self._run(self._client.disconnect(), _CLOSE_SECONDS, None)
        self._socket.close()
        self._loop.close()
        if self.process is not None:
            self.process.close()
