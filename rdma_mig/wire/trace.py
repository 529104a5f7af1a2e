# SPDX-License-Identifier: Apache-2.0
"""Trace records: what a migration did and when, one JSON object a line.

The kinds are listed in docs/reliability.md, trace.

A record has `t`, seconds since the trace was begun (CLOCK_MONOTONIC), `kind`, and the fields of
its kind. Kinds and fields are only ever added.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["KINDS", "TraceRecord", "encode_record"]

KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "begin": ("version", "role", "clock"),
    "cm": ("event", "status", "peer"),
    "connected": ("peer", "local", "device", "transport", "pin_all"),
    "out": ("channel", "type", "length", "repeat"),
    "in": ("channel", "type", "length", "repeat"),
    "populate": ("bytes", "seconds"),
    "register": ("block", "chunk", "bytes", "seconds"),
    "deregister": ("block", "chunk", "bytes"),
    "phase": ("number", "state"),
    "write": ("block", "chunk", "last", "whole", "writes", "bytes"),
    "round": ("number", "last"),
    "wait": ("awaited", "seconds"),
    "commit": ("role", "by", "state"),
    "end": ("status", "message"),
}
"""The fields of each kind, in the order in which they are written."""

_TEMPLATES = {
    kind: '{"t":%r,"kind":"' + "".join([kind, '"', *(f',"{name}":%s' for name in names), "}\n"])
    for kind, names in KINDS.items()
}
_JSON = json.JSONEncoder(separators=(",", ":")).encode
_TEXT_MAX = 512  # characters; a longer one is cut, whatever a peer calls its blocks


def encode_record(t: float, kind: str, fields: Mapping[str, Any]) -> bytes:
    """Return the line of a record, as `TraceRecord.encode`: without an object on the way.

    It is within what it tells of, some hundred times a second and more.
    """
    names = KINDS.get(kind, ())
    if len(fields) != len(names) or not names or not all(map(fields.__contains__, names)):
        raise LocalProtocolError(f"no trace record: {kind} with {sorted(fields)}")
    values = [_encoded(fields[name]) for name in names]
    return (_TEMPLATES[kind] % (round(t, 6), *values)).encode("ascii")


def _encoded(value: Any) -> str:
    if type(value) is int:
        return str(value)
    return _quoted(value) if type(value) is str else _JSON(value)


@functools.lru_cache(maxsize=512)
def _quoted(text: str) -> str:
    """A text for JSON: most come again and again."""
    return _JSON(text[:_TEXT_MAX])


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One line of a trace.

    Attributes:
        t: seconds since the trace was begun.
        kind: what happened, one of `KINDS`.
        fields: numbers, texts, booleans or None by name: those of the kind.
    """

    t: float
    kind: str
    fields: Mapping[str, Any]

    def encode(self) -> bytes:
        """Return the line, ASCII, its end included.

        Raises:
            LocalProtocolError: an unknown kind, or other fields than it has.
        """
        return encode_record(self.t, self.kind, self.fields)

    @classmethod
    def decode(cls, line: bytes) -> TraceRecord:
        """Read a line; kinds and fields of a newer version are taken as they are.

        Raises:
            RemoteProtocolError: no trace record, or one that lacks a field of its kind.
        """
        try:
            content = json.loads(line.decode("ascii"))
        except (ValueError, RecursionError):
            raise RemoteProtocolError("a line of the trace is no JSON") from None
        if not isinstance(content, dict):
            raise RemoteProtocolError("a line of the trace is no object")
        t, kind = content.pop("t", None), content.pop("kind", None)
        if type(t) not in (int, float) or not math.isfinite(t) or t < 0:
            raise RemoteProtocolError("a trace record has no time")
        if not isinstance(kind, str) or not kind:
            raise RemoteProtocolError("a trace record has no kind")
        if missing := set(KINDS.get(kind, ())) - set(content):
            raise RemoteProtocolError(f"a trace record {kind[:32]!a} lacks {min(missing)}")
        return cls(float(t), kind, content)
