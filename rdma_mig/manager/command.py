# SPDX-License-Identifier: Apache-2.0
"""Command lines of QEMUs: as text to paste, and with what a restore needs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rdma_mig.errors import UsageError

__all__ = ["CommandLine"]

_QMP = "unix:{},server=on,wait=off"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """How a QEMU is started.

    Attributes:
        arguments: the program and its arguments; bytes that are no UTF-8 as surrogates.
        directory: the working directory that relative paths in it are relative to.
    """

    arguments: tuple[str, ...]
    directory: str

    def __str__(self) -> str:
        """For a shell."""
        return shlex.join(self.arguments)

    def _places(self, *options: str) -> list[int]:
        """Where options of these names stand; QEMU takes one hyphen or two."""
        names = {hyphens + option for option in options for hyphens in ("-", "--")}
        return [at for at, word in enumerate(self.arguments) if at and word in names]

    def has(self, *options: str) -> bool:
        """Whether one of these options is in it, named without hyphens."""
        return bool(self._places(*options))

    def value(self, option: str) -> str | None:
        """Return the value of an option's last occurrence; None where it is not there."""
        places = self._places(option)
        return (
            self.arguments[places[-1] + 1]
            if places and places[-1] + 1 < len(self.arguments)
            else None
        )

    def _without(self, option: str) -> CommandLine:
        drop = {at + more for at in self._places(option) for more in (0, 1)}
        return replace(
            self, arguments=tuple(w for at, w in enumerate(self.arguments) if at not in drop)
        )

    def waiting(self) -> CommandLine:
        """Return it with ``-incoming defer`` in place of what it has of that."""
        bare = self._without("incoming")
        return replace(bare, arguments=(*bare.arguments, "-incoming", "defer"))

    def to_run_again(self) -> CommandLine:
        """Return it for a second QEMU of this machine: it waits, and stays this process's child.

        Its own QMP sockets are left out: who asks for it has one made.
        """
        line = self.waiting()._without("qmp")
        drop = set(line._places("daemonize"))
        return replace(
            line, arguments=tuple(w for at, w in enumerate(line.arguments) if at not in drop)
        )

    def reachable(self, socket: str) -> CommandLine:
        """Return it with one QMP socket more."""
        more = ("-qmp", _QMP.format(socket.replace(",", ",,")))
        return replace(self, arguments=(*self.arguments, *more))

    def qmp_socket(self) -> str | None:
        """Return the path of the QMP socket that ``-qmp`` makes; None where there is none."""
        value = self.value("qmp")
        if value is None or not value.startswith("unix:"):
            return None
        words = value.removeprefix("unix:").replace(",,", "\0").split(",")
        options = {word.partition("=")[0]: word.partition("=")[2] for word in words[1:]}
        if "server" not in options or options["server"] not in ("", "on"):
            return None
        return words[0].replace("\0", ",")

    @classmethod
    def to_spawn(cls, words: Sequence[str], directory: str) -> CommandLine:
        """Take what the operator wrote behind ``--``.

        Raises:
            UsageError: there is nothing, or it waits elsewhere, or leaves this process.
        """
        if not words:
            raise UsageError(
                "--spawn needs the command that starts a QEMU",
                remedy="--spawn -- qemu-system-x86_64 -machine TYPE -m SIZE ...",
            )
        line = cls(tuple(words), directory)
        if line.has("daemonize"):
            raise UsageError(
                "a QEMU with -daemonize cannot be watched from here",
                remedy="leave it out: the QEMU runs on in the background when it has the machine",
            )
        if line.has("incoming") and line.value("incoming") != "defer":
            raise UsageError(
                f"-incoming {str(line.value('incoming'))[:60]} waits where nothing is sent to",
                remedy="say -incoming defer, or leave it out",
            )
        return line if line.has("incoming") else line.waiting()
