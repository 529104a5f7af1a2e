# SPDX-License-Identifier: Apache-2.0
"""Migration URIs of all transports, in QEMU's syntax.

``rdma:HOST:PORT``, ``tcp:HOST:PORT``, ``unix:PATH``, ``fd:NUMBER``, ``exec:COMMAND`` and
``file:PATH[,offset=BYTES]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from rdma_mig.errors import UsageError
from rdma_mig.wire.address import RdmaAddress, TcpAddress

__all__ = [
    "SCHEMES",
    "ExecAddress",
    "FdAddress",
    "FileAddress",
    "MigrationAddress",
    "RdmaAddress",
    "TcpAddress",
    "UnixAddress",
    "parse_uri",
]

SCHEMES = ("rdma", "tcp", "unix", "fd", "exec", "file")

# sun_path holds 108 bytes, the NUL behind it among them (unix(7)).
_UNIX_PATH_MAX = 107
_OFFSET = re.compile(r"(0x[0-9a-f]{1,16}|[0-9]{1,19})([KMGT]?)", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_EXAMPLE = f"write one of {', '.join(f'{scheme}:...' for scheme in SCHEMES)}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """``unix:PATH``: a socket in the file system."""

    scheme: ClassVar[str] = "unix"

    path: str

    def __str__(self) -> str:
        """The URI."""
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class FdAddress:
    """``fd:NUMBER``: a descriptor that this process was started with.

    Attributes:
        number: of the descriptor.
        peer: who is at its other end, for messages; empty where that is not known.
    """

    scheme: ClassVar[str] = "fd"

    number: int
    peer: str = ""

    def __str__(self) -> str:
        """The URI."""
        return f"fd:{self.number}"


@dataclass(frozen=True, slots=True)
class ExecAddress:
    """``exec:COMMAND``: the output, or the input, of a command that the shell runs."""

    scheme: ClassVar[str] = "exec"

    command: str

    def __str__(self) -> str:
        """The URI."""
        return f"exec:{self.command}"


@dataclass(frozen=True, slots=True)
class FileAddress:
    """``file:PATH``: a stream in a file, from an offset on, bytes."""

    scheme: ClassVar[str] = "file"

    path: str
    offset: int = 0

    def __str__(self) -> str:
        """The URI."""
        return f"file:{self.path}" + (f",offset={self.offset}" if self.offset else "")


MigrationAddress = RdmaAddress | TcpAddress | UnixAddress | FdAddress | ExecAddress | FileAddress


def parse_uri(uri: str, *, listening: bool) -> MigrationAddress:
    """Parse a migration URI.

    Args:
        uri: what the operator wrote.
        listening: whether it is a destination's, which may leave its port to the system.

    Raises:
        UsageError: with the remedy.
    """
    shown = f"{uri[:100]!r}"
    scheme, colon, rest = uri.partition(":")
    if not colon or scheme not in SCHEMES:
        got = f"scheme {scheme[:32]!r}" if colon else "no scheme"
        raise UsageError(f"{shown} has {got}", remedy=_EXAMPLE)
    if scheme == "rdma":
        return RdmaAddress.parse(uri, listening=listening)
    if scheme == "tcp":
        return TcpAddress.parse(uri, listening=listening)
    if not rest or "\0" in rest:
        raise UsageError(
            f"{shown} has {'a NUL byte' if rest else 'nothing'} behind its scheme", remedy=_EXAMPLE
        )
    if scheme == "unix":
        return _unix(shown, rest)
    if scheme == "fd":
        return _fd(shown, rest)
    if scheme == "exec":
        return ExecAddress(rest)
    return _file(shown, rest)


def _unix(shown: str, path: str) -> UnixAddress:
    size = len(path.encode("utf-8", "surrogateescape"))
    if size > _UNIX_PATH_MAX:
        raise UsageError(
            f"{shown} has a path of {size} bytes, allowed are {_UNIX_PATH_MAX}",
            remedy="put the socket into a directory with a shorter name, such as /run",
        )
    return UnixAddress(path)


def _fd(shown: str, text: str) -> FdAddress:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise UsageError(
            f"{shown} has {text[:32]!r}, which is no number of a descriptor",
            remedy="names belong to QEMU's monitor (getfd); write fd:N, and start this command "
            "with descriptor N open",
        )
    return FdAddress(int(text))


def _file(shown: str, rest: str) -> FileAddress:
    path, option, value = rest.rpartition(",offset=")
    if not option:
        return FileAddress(rest)
    found = _OFFSET.fullmatch(value)
    offset = int(found[1], 0 if found[1][:2].lower() == "0x" else 10) if found else -1
    if found:
        offset <<= _UNITS[found[2].upper()]
    if not path or not 0 <= offset < 1 << 62:
        raise UsageError(
            f"{shown} has offset {value[:32]!r}, allowed are 0 to 2^62 bytes behind a path",
            remedy="write file:PATH,offset=BYTES, such as offset=1M",
        )
    return FileAddress(path, offset)
