# SPDX-License-Identifier: Apache-2.0
"""Trace files, read record by record; whatever they contain, the answer is one clear line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from rdma_mig.errors import MigrationError, RemoteProtocolError
from rdma_mig.wire.trace import TraceRecord

__all__ = ["Numbered", "TraceFileError", "check_fields", "read_trace"]

_LINE_MAX = 32768  # bytes; no record that we write is longer (rdma_mig.wire.trace)

_NUMBER = (int, float)
_TEXT = (str,)
_COUNT = (int,)
_FLAG = (bool,)
_OPTIONAL_COUNT = (int, type(None))
_OPTIONAL_TEXT = (str, type(None))
_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "begin": {"version": _COUNT, "role": _TEXT, "clock": _NUMBER},
    "cm": {"event": _TEXT, "status": _COUNT, "peer": _TEXT},
    "connected": {
        "peer": _TEXT,
        "local": _TEXT,
        "device": _OPTIONAL_TEXT,
        "transport": _TEXT,
        "pin_all": _FLAG,
    },
    "out": {"channel": _TEXT, "type": _TEXT, "length": _COUNT, "repeat": _COUNT},
    "in": {"channel": _TEXT, "type": _TEXT, "length": _COUNT, "repeat": _COUNT},
    "populate": {"bytes": _COUNT, "seconds": _NUMBER},
    "register": {
        "block": _TEXT,
        "chunk": _OPTIONAL_COUNT,
        "bytes": _COUNT,
        "seconds": _NUMBER,
    },
    "deregister": {"block": _TEXT, "chunk": _OPTIONAL_COUNT, "bytes": _COUNT},
    "phase": {"number": _COUNT, "state": _TEXT},
    "write": {
        "block": _TEXT,
        "chunk": _COUNT,
        "last": _COUNT,
        "whole": _FLAG,
        "writes": _COUNT,
        "bytes": _COUNT,
    },
    "round": {"number": _COUNT, "last": _FLAG},
    "wait": {"awaited": _TEXT, "seconds": _NUMBER},
    "commit": {"role": _TEXT, "by": _TEXT, "state": _TEXT},
    "end": {"status": _TEXT, "message": _TEXT},
}


class TraceFileError(MigrationError):
    """A file is no trace, or is cut off or damaged from some record on."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """A record, and which line of its file it is.

    Attributes:
        number: of the line, from 1.
        record: its content, fields of the types that its kind has.
    """

    number: int
    record: TraceRecord

    def __getitem__(self, field: str) -> Any:
        return self.record.fields[field]


def check_fields(record: TraceRecord) -> None:
    """Refuse a field that is not of its type, or a number below 0.

    Raises:
        RemoteProtocolError: says which.
    """
    for name, types in _TYPES.get(record.kind, {}).items():
        value = record.fields[name]
        # bool is an int to Python, and is none here.
        fits = isinstance(value, types) and (type(value) is not bool or types is _FLAG)
        negative = isinstance(value, _NUMBER) and not value >= 0 and name != "status"
        if not fits or negative or (isinstance(value, _NUMBER) and not abs(value) < 1 << 64):
            shown = ascii(value)[:40]
            raise RemoteProtocolError(f"a trace record {record.kind!r} has {name} {shown}")


def read_trace(
    path: str | os.PathLike[str], more: Callable[[], bool] | None = None
) -> Iterator[Numbered]:
    """Read a file that ``--trace`` has written, a record at a time.

    Args:
        path: of the file.
        more: called where records end without the one that ends a trace; returns, after a while,
            whether to look again.

    Raises:
        TraceFileError: it cannot be read, is no trace, or has a line that is no whole record; says
            which one.
    """
    name = os.fspath(path)
    number = 0
    try:
        with open(path, "rb") as lines:
            follow = more if lines.seekable() else None
            for line in _followed(lines, follow) if follow else _written(lines):
                number += 1
                record = _record(line, number, name)
                yield Numbered(number, record)
                if follow and record.kind == "end":
                    return
    except OSError as error:
        raise TraceFileError(f"the trace {name} cannot be read: {error.strerror}") from error
    if number == 0:
        raise TraceFileError(f"the trace {name} is empty")


def _written(lines: BinaryIO) -> Iterator[bytes]:
    """The lines of a file that nobody writes any more, or of a pipe."""
    while line := lines.readline(_LINE_MAX + 1):
        if line[0] == 0 and _ends_here(lines):
            return
        yield line


def _followed(lines: BinaryIO, more: Callable[[], bool]) -> Iterator[bytes]:
    """The lines of a file that grows; where there is none yet, or not the whole of one, again."""
    while True:
        at = lines.tell()
        line = lines.readline(_LINE_MAX + 1)
        if line[:1] not in (b"", b"\0") and (line.endswith(b"\n") or len(line) > _LINE_MAX):
            yield line
        elif more():
            lines.seek(0, os.SEEK_END)  # what was read ahead is out of date
            lines.seek(at)
        else:
            return


def _ends_here(rest: BinaryIO) -> bool:
    """Whether a line that begins with a zero is the end of a trace that was not closed.

    Its file is longer than its content, by zeros. They may have a record in them that was being
    written: its first byte comes last.
    """
    while piece := rest.read(_LINE_MAX):
        if piece.strip(b"\0"):
            return False
    return True


def _record(line: bytes, number: int, name: str) -> TraceRecord:
    if not line.endswith(b"\n"):
        if len(line) > _LINE_MAX:
            raise TraceFileError(f"{name}: record {number} is longer than any record is")
        raise TraceFileError(
            f"{name}: record {number} is cut off: what wrote the trace was killed, runs still, or "
            "had no room"
        )
    try:
        record = TraceRecord.decode(line)
        check_fields(record)
    except RemoteProtocolError as error:
        raise TraceFileError(f"{name}: record {number} is none: {error.message}") from None
    if number == 1 and record.kind != "begin":
        raise TraceFileError(f"{name} is no trace of rdma-migrate: it has no record 'begin' first")
    return record
