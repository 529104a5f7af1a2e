# SPDX-License-Identifier: Apache-2.0
"""The return path: what a destination tells its source while the migration goes on.

Frames of u16 type, u16 length and data, in a byte stream of their own whose cuts mean nothing.

Wire: docs/protocol.md, return path.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from rdma_mig.errors import RemoteProtocolError
from rdma_mig.wire.fields import check_uint

__all__ = [
    "RETURN_PATH_PING",
    "Pong",
    "ReturnListener",
    "ReturnMessage",
    "ReturnParser",
    "ReturnType",
    "Shut",
    "SwitchoverAck",
]

RETURN_PATH_PING = 1
"""Value of the PING that a return path is tried with; QEMU's own."""

_HEADER = struct.Struct(">HH")
_U32 = struct.Struct(">I")


class ReturnType(IntEnum):
    """Type of a frame. Wire: docs/protocol.md, return path."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


@dataclass(frozen=True, slots=True)
class Shut:
    """The destination is through: the last frame.

    Args:
        status: u32; 0 when it has loaded everything, else it has failed.
    """

    status: int

    def encode(self) -> bytes:
        """Return the frame's bytes."""
        check_uint("status of SHUT", self.status, 32)
        return _HEADER.pack(ReturnType.SHUT, 4) + _U32.pack(self.status)


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to the stream's command PING.

    Args:
        value: u32, the one of the PING.
    """

    value: int

    def encode(self) -> bytes:
        """Return the frame's bytes."""
        check_uint("value of PONG", self.value, 32)
        return _HEADER.pack(ReturnType.PONG, 4) + _U32.pack(self.value)


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """The destination's leave to stop the guest; newer QEMUs send it unless told not to."""

    def encode(self) -> bytes:
        """Return the frame's bytes."""
        return _HEADER.pack(ReturnType.SWITCHOVER_ACK, 0)


ReturnMessage = Shut | Pong | SwitchoverAck

# Everything else belongs to postcopy, which no source of ours begins.
_LENGTHS = {ReturnType.SHUT: 4, ReturnType.PONG: 4, ReturnType.SWITCHOVER_ACK: 0}


class ReturnParser:
    """Turns the bytes of a return path into frames; holds at most one frame that is not whole.

    Wire: docs/protocol.md, return path.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._over = False

    def feed(self, data: bytes) -> None:
        """Append bytes of the stream."""
        self._buffer += data

    def next_message(self) -> ReturnMessage | None:
        """Return the next frame; None when more bytes are needed.

        Raises:
            RemoteProtocolError: a type that has no place in a migration without postcopy, a length
                that its type does not have, or bytes behind SHUT.
        """
        if self._over and self._buffer:
            raise RemoteProtocolError(
                f"return path has {len(self._buffer)} bytes behind SHUT, which is its last frame"
            )
        if len(self._buffer) < _HEADER.size:
            return None
        number, length = _HEADER.unpack_from(self._buffer)
        try:
            kind = ReturnType(number)
        except ValueError:
            raise RemoteProtocolError(
                f"return path has frame type {number}, which is unknown"
            ) from None
        if kind not in _LENGTHS:
            raise RemoteProtocolError(
                f"return path has frame {kind.name}, which belongs to postcopy",
                remedy="switch postcopy-ram off at the destination, or do not begin postcopy",
            )
        if length != _LENGTHS[kind]:
            raise RemoteProtocolError(
                f"return path frame {kind.name} has {length} bytes, allowed are {_LENGTHS[kind]}"
            )
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        if kind is ReturnType.SHUT:
            self._over = True
            return Shut(*_U32.unpack(data))
        if kind is ReturnType.PONG:
            return Pong(*_U32.unpack(data))
        return SwitchoverAck()


class ReturnListener:
    """What a source hears on its return path, checked against what it may hear.

    Args:
        ping: value of the PING that the stream carries.
    """

    def __init__(self, ping: int) -> None:
        self._parser = ReturnParser()
        self._ping = ping
        self._ponged = False

    def feed(self, data: bytes) -> None:
        """Append bytes of the return path."""
        self._parser.feed(data)

    def status(self, peer: str) -> int | None:
        """Return SHUT's status, 0 when the destination has loaded everything; None for not yet.

        Args:
            peer: the destination, for the message.

        Raises:
            RemoteProtocolError: another frame than the PONG that is due, or none at all before.
        """
        while (message := self._parser.next_message()) is not None:
            match message:
                case Pong() if message.value == self._ping and not self._ponged:
                    self._ponged = True
                case SwitchoverAck():
                    pass
                case Shut() if self._ponged or message.status != 0:
                    return message.status
                case _:
                    due = "SHUT" if self._ponged else f"PONG {self._ping}"
                    raise RemoteProtocolError(
                        f"{peer} sent {message} on the return path where {due} was due"
                    )
        return None
