# SPDX-License-Identifier: Apache-2.0
"""Where the device state ends, and what it holds.

Device state has no length. The source ends it with an EOF byte and, nearly always, a JSON
description of what it sent; finding that description is how its end is recognised without
knowing any device.

Wire: docs/protocol.md, end of stream.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.fields import checked_text

__all__ = [
    "DESCRIPTION_HEADER_SIZE",
    "DESCRIPTION_MAX",
    "Description",
    "DeviceInfo",
    "DeviceStateScanner",
    "parse_description",
]

#: Bytes of JSON that are looked at; real descriptions are well below 1 MiB.
DESCRIPTION_MAX = 64 << 20
#: Bytes before the JSON: EOF, the description's type byte and its length.
DESCRIPTION_HEADER_SIZE = 6

_START = b"\x00\x06"
# A footer (type byte and section id) and the EOF byte.
_CLOSING_SIZE = 6
_FOOTER = 0x7E


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device section, as the description names it.

    Args:
        name: idstr of the section.
        instance_id: which of several devices of that name.
        vmsd_name: name of its state format, where it has one.
        version: version of that format, where given.
    """

    name: str
    instance_id: int
    vmsd_name: str | None = None
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """The description at the end of a migration stream.

    Args:
        page_size: bytes of a target page.
        devices: in stream order.
    """

    page_size: int
    devices: tuple[DeviceInfo, ...]


class DeviceStateScanner:
    """Watches the bytes behind the RAM section's end and says when they are whole.

    Feed it all of them, cut anywhere. It keeps only what may still turn out to be a description:
    at most DESCRIPTION_MAX + 11 bytes.

    JSON holds no NUL byte. So a description can only start within five bytes of the last NUL that
    was seen (its own length field may hold NULs), and one search from the right per feed does.
    """

    def __init__(self) -> None:
        self._total = 0
        # Bytes from offset _base on. Empty and useless while nothing can start there any more.
        self._kept = bytearray()
        self._base = 0
        self._found: int | None = None
        self._judged_at = -1

    @property
    def total(self) -> int:
        """Bytes fed so far."""
        return self._total

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes of the stream."""
        if not len(data):
            return
        searched = len(self._kept)
        self._kept += data
        self._total += len(data)
        last_nul = self._kept.rfind(b"\0", searched)
        if last_nul >= 0:
            # The one before may still be the start of a header whose length field this one is in.
            self._drop(max(0, last_nul - (DESCRIPTION_HEADER_SIZE - 1)))
        if not self._candidates():
            self._drop(max(0, len(self._kept) - _CLOSING_SIZE))

    @property
    def complete(self) -> bool:
        """Whether the bytes so far end exactly where a description ends."""
        return self._start() is not None

    @property
    def eof_offset(self) -> int:
        """Offset just behind the EOF byte that ends the device state.

        Raises:
            LocalProtocolError: the bytes so far neither end with a description nor close
                without one.
        """
        start = self._start()
        if start is not None:
            return start + 1
        if self.closes_without_description:
            return self._total
        raise LocalProtocolError("the device state has not ended")

    @property
    def description(self) -> bytes:
        """The JSON text of the description.

        Raises:
            LocalProtocolError: the bytes so far do not end with a description.
        """
        start = self._start()
        if start is None:
            raise LocalProtocolError("the device state has not ended with a description")
        return bytes(self._kept[start - self._base + DESCRIPTION_HEADER_SIZE :])

    @property
    def closes_without_description(self) -> bool:
        """Whether the bytes so far end with a section footer and EOF.

        That is how a stream without a description ends, and how one with a description looks just
        before it: ask only when no more bytes will come.
        """
        tail = self._kept[-_CLOSING_SIZE:]
        return len(tail) == _CLOSING_SIZE and tail[0] == _FOOTER and tail[-1] == 0

    def _drop(self, count: int) -> None:
        if count:
            del self._kept[:count]
            self._base += count

    def _candidates(self) -> list[tuple[int, int | None]]:
        """Starts in _kept that fit what is there, each with the end it announces once known."""
        found: list[tuple[int, int | None]] = []
        kept = self._kept
        # feed() drops what precedes the last NUL by more than five bytes, so all NULs are here.
        last_nul = kept.rfind(b"\0", 0, DESCRIPTION_HEADER_SIZE)
        for at in range(last_nul + 1):
            if not _START.startswith(kept[at : at + 2]):
                continue
            body = at + DESCRIPTION_HEADER_SIZE
            if len(kept) < body:
                found.append((at, None))
                continue
            end = body + int.from_bytes(kept[at + 2 : body], "big")
            sized = body + 2 <= end <= body + DESCRIPTION_MAX and len(kept) <= end
            if sized and last_nul < body and b"{".startswith(kept[body : body + 1]):
                found.append((at, end))
        return found

    def _start(self) -> int | None:
        """Offset in the stream of the description's EOF byte; judged once per total."""
        if self._judged_at != self._total:
            self._judged_at = self._total
            self._found = None
            for at, end in self._candidates():
                if end == len(self._kept) and _is_description(
                    bytes(self._kept[at + DESCRIPTION_HEADER_SIZE :])
                ):
                    self._found = self._base + at
                    break
        return self._found


def _is_description(raw: bytes) -> bool:
    try:
        return isinstance(_load(raw).get("devices"), list)
    except RemoteProtocolError:
        return False


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _load(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise RemoteProtocolError("device description is nested too deeply") from None
    except ValueError as error:  # covers bad UTF-8, bad JSON and integers of thousands of digits
        raise RemoteProtocolError(f"device description is no JSON: {str(error)[:128]}") from None
    if not isinstance(value, dict):
        raise RemoteProtocolError(
            f"device description is a {type(value).__name__}, allowed is an object"
        )
    return value


def _integer(where: str, value: object) -> int:
    if type(value) is not int:
        raise RemoteProtocolError(f"{where} is {_short(value)}, allowed is an integer")
    return value


def _text(where: str, value: object) -> str:
    if type(value) is not str:
        raise RemoteProtocolError(f"{where} is {_short(value)}, allowed is a string")
    return checked_text(where, value, 4096, RemoteProtocolError)


def _short(value: object) -> str:
    # No repr of a peer's containers: they may be nested deeply or be huge.
    if value is None:
        return "missing"
    return f"a {type(value).__name__}"


def _device(index: int, value: object) -> DeviceInfo:
    where = f"device {index} of the description"
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{where} is {_short(value)}, allowed is an object")
    vmsd_name = value.get("vmsd_name")
    version = value.get("version")
    return DeviceInfo(
        _text(f"name of {where}", value.get("name")),
        _integer(f"instance_id of {where}", value.get("instance_id")),
        None if vmsd_name is None else _text(f"vmsd_name of {where}", vmsd_name),
        None if version is None else _integer(f"version of {where}", version),
    )


def parse_description(raw: bytes) -> Description:
    """Read a description; keys that are not needed are ignored.

    Args:
        raw: the JSON text, at most DESCRIPTION_MAX bytes.

    Raises:
        RemoteProtocolError: too long, no JSON, nested too deeply, or a value of a wrong type.
    """
    if len(raw) > DESCRIPTION_MAX:
        raise RemoteProtocolError(
            f"device description has {len(raw)} bytes, allowed are {DESCRIPTION_MAX}"
        )
    value = _load(bytes(raw))
    page_size = _integer("page_size of the description", value.get("page_size"))
    if page_size < 1:
        raise RemoteProtocolError("page_size of the description is not positive")
    devices = value.get("devices")
    if not isinstance(devices, list):
        raise RemoteProtocolError(
            f"devices of the description is {_short(devices)}, allowed is a list"
        )
    return Description(page_size, tuple(_device(at, item) for at, item in enumerate(devices)))
