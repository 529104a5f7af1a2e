# SPDX-License-Identifier: Apache-2.0
"""The process of a QEMU on this host: how it was started, and what it says on standard error."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path

from rdma_mig.closing import Closing
from rdma_mig.manager.command import CommandLine

__all__ = ["QemuProcess"]

# struct ucred of unix(7): process, user and group id.
_CREDENTIALS = struct.Struct("3i")
# Of what QEMU has said, the last lines and bytes tell why it ended.
_LINES = 3
_BYTES = 2000
_NAMES = ("qemu", "kvm")


class QemuProcess(Closing):
    """A process that is a QEMU, as far as this user may look at it.

    Args:
        pid: of a QEMU.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._stderr = self._open_stderr()

    @classmethod
    def behind(cls, connection: socket.socket) -> QemuProcess | None:
        """Return the process that listens at the other end of a unix socket.

        None where that is none of this host, not visible, or no QEMU: a manager may have made the
        socket, or something that forwards it to another host.
        """
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _user, _group = _CREDENTIALS.unpack(raw)
        try:
            name = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
        except OSError:
            return None
        return cls(pid) if any(each in name for each in _NAMES) else None

    def command_line(self) -> CommandLine | None:
        """Return how it was started; None where that cannot be read."""
        try:
            raw = Path(f"/proc/{self.pid}/cmdline").read_bytes()
            directory = os.readlink(f"/proc/{self.pid}/cwd")
        except OSError:
            return None
        arguments = tuple(os.fsdecode(word) for word in raw.removesuffix(b"\0").split(b"\0"))
        return CommandLine(arguments, directory) if arguments[0] else None

    @property
    def stopped(self) -> bool:
        """Whether it rests by a signal (SIGSTOP, Ctrl-Z) or in a debugger, and answers nothing."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return fields[0] in ("T", "t")

    def _open_stderr(self) -> int:
        # A description of its own, at the present end. A terminal or a pipe is others' to read.
        path = f"/proc/{self.pid}/fd/2"
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(path).st_mode):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.lseek(fd, 0, os.SEEK_END)
                return fd
        return -1

    def words(self) -> str:
        """Return what it has said on standard error since this was made, in one line.

        Empty where nothing was said, or where it cannot be read.
        """
        if self._stderr < 0:
            return ""
        begin = os.lseek(self._stderr, 0, os.SEEK_CUR)
        size = os.fstat(self._stderr).st_size
        raw = os.pread(self._stderr, _BYTES, max(begin, size - _BYTES))
        lines = [line.strip() for line in raw.decode("utf-8", "replace").splitlines()]
        return "; ".join([line for line in lines if line][-_LINES:])

    def close(self) -> None:
        """Let go of its messages. Idempotent."""
        fd, self._stderr = self._stderr, -1
        if fd >= 0:
            os.close(fd)
