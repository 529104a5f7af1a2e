# SPDX-License-Identifier: Apache-2.0
"""Control messages: what every SEND between the two ends carries.

The records that payloads consist of live in :mod:`rdma_mig.wire.records` and are exported from
here as well.

Wire: docs/protocol.md, control channel; QEMU docs/rdma.txt (whose list of types starts at 1,
the wire at 0).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from rdma_mig.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from rdma_mig.wire.fields import check_uint
from rdma_mig.wire.records import (
    CHUNK_SIZE,
    FINAL_ACK_MESSAGE_MAX,
    MAX_RAM_BLOCKS,
    FinalAck,
    RamBlockRecord,
    RegisterRecord,
    RegisterResult,
    ZeroRun,
    check_register,
    check_unregister,
    check_zero_run,
    chunk_count,
    decode_ram_blocks,
    decode_register_requests,
    decode_register_results,
    encode_ram_blocks,
)

__all__ = [
    "CHUNK_SIZE",
    "CONTROL_HEADER_SIZE",
    "CONTROL_MAX",
    "CONTROL_MAX_PAYLOAD",
    "EMPTY",
    "MAX_RAM_BLOCKS",
    "MAX_REPEAT",
    "ControlHeader",
    "ControlMessage",
    "ControlType",
    "FinalAck",
    "RamBlockRecord",
    "RegisterRecord",
    "RegisterResult",
    "ZeroRun",
    "check_register",
    "check_unregister",
    "check_zero_run",
    "chunk_count",
    "decode_ram_blocks",
    "decode_register_requests",
    "decode_register_results",
    "describe",
    "encode_ram_blocks",
]

CONTROL_HEADER_SIZE = 16
#: Bytes of the largest message, header included; receive buffers have this size.
CONTROL_MAX = 524288
CONTROL_MAX_PAYLOAD = CONTROL_MAX - CONTROL_HEADER_SIZE
#: Records that one request may announce.
MAX_REPEAT = 4096


class ControlType(IntEnum):
    """Type of a control message. Wire: docs/protocol.md, control channel."""

    NONE = 0
    ERROR = 1
    READY = 2
    QEMU_FILE = 3
    RAM_BLOCKS_REQUEST = 4
    RAM_BLOCKS_RESULT = 5
    COMPRESS = 6
    REGISTER_REQUEST = 7
    REGISTER_RESULT = 8
    REGISTER_FINISHED = 9
    UNREGISTER_REQUEST = 10
    UNREGISTER_FINISHED = 11
    #: Ours; sent only where both ends announced FEATURE_FINAL_ACK in the handshake.
    FINAL_ACK = 0x524D_4701
    #: Ours, under the same condition: the stream ends here, no description follows.
    STREAM_END = 0x524D_4702


_TYPES: dict[int, ControlType] = {int(kind): kind for kind in ControlType}
#: Messages that have no payload.
EMPTY = frozenset(
    {
        ControlType.ERROR,
        ControlType.READY,
        ControlType.RAM_BLOCKS_REQUEST,
        ControlType.REGISTER_FINISHED,
        ControlType.UNREGISTER_FINISHED,
        ControlType.STREAM_END,
    }
)
_COUNTED = frozenset({ControlType.REGISTER_REQUEST, ControlType.UNREGISTER_REQUEST})


@dataclass(frozen=True, slots=True)
class ControlHeader:
    """The 16 bytes before every payload.

    Args:
        length: bytes of payload that follow, at most 524272.
        type: u32; a :class:`ControlType` once it is known to be one.
        repeat: u32, number of records; noise in all messages but the two requests of records.

    Wire: docs/protocol.md, control channel.
    """

    _FORMAT: ClassVar[struct.Struct] = struct.Struct(">III4x")

    length: int
    type: int
    repeat: int = 1

    def encode(self) -> bytes:
        """Return 16 bytes, padding zero.

        Raises:
            LocalProtocolError: a field does not fit.
        """
        if not isinstance(self.length, int) or not 0 <= self.length <= CONTROL_MAX_PAYLOAD:
            raise LocalProtocolError(
                f"control message has {self.length!r} bytes of payload, "
                f"allowed are 0 to {CONTROL_MAX_PAYLOAD}"
            )
        check_uint("control message type", self.type, 32)
        check_uint("control message repeat", self.repeat, 32)
        return self._FORMAT.pack(self.length, self.type, self.repeat)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> ControlHeader:
        """Decode the first 16 bytes of a message; padding is ignored.

        Raises:
            RemoteProtocolError: fewer than 16 bytes, or a length above 524272.
        """
        if len(data) < CONTROL_HEADER_SIZE:
            raise RemoteProtocolError(
                f"control message has {len(data)} bytes, "
                f"allowed are {CONTROL_HEADER_SIZE} to {CONTROL_MAX}"
            )
        length, kind, repeat = cls._FORMAT.unpack_from(data)
        if length > CONTROL_MAX_PAYLOAD:
            raise RemoteProtocolError(
                f"control message announces {length} bytes of payload, "
                f"allowed are 0 to {CONTROL_MAX_PAYLOAD}"
            )
        return cls(length, kind, repeat)


def _fault(kind: ControlType, length: int, repeat: int) -> str:
    """Say what is wrong with a message of this type, length and repeat; empty when nothing is."""
    allowed = ""
    if kind is ControlType.NONE:
        return "control message type NONE is never sent"
    if kind in EMPTY:
        allowed = "" if length == 0 else "0"
    elif kind is ControlType.QEMU_FILE:
        allowed = "" if length >= 1 else f"1 to {CONTROL_MAX_PAYLOAD}"
    elif kind is ControlType.COMPRESS:
        allowed = "" if length == ZeroRun.SIZE else str(ZeroRun.SIZE)
    elif kind in _COUNTED:
        if not 1 <= repeat <= MAX_REPEAT:
            return f"{kind.name} has repeat {repeat}, allowed are 1 to {MAX_REPEAT}"
        expected = repeat * RegisterRecord.SIZE
        allowed = "" if length == expected else f"{expected} for repeat {repeat}"
    elif kind is ControlType.FINAL_ACK:
        most = 4 + FINAL_ACK_MESSAGE_MAX
        allowed = "" if 4 <= length <= most else f"4 to {most}"
    else:
        ram = kind is ControlType.RAM_BLOCKS_RESULT
        size = RamBlockRecord.SIZE if ram else RegisterResult.SIZE
        allowed = "" if length and length % size == 0 else f"multiples of {size}"
    return f"{kind.name} has {length} bytes of payload, allowed are {allowed}" if allowed else ""


@dataclass(frozen=True, slots=True)
class ControlMessage:
    """One control message.

    Args:
        type: its type.
        payload: at most 524272 bytes; of the size that the type asks for.
        repeat: u32; the number of records in REGISTER_REQUEST and UNREGISTER_REQUEST, noise
            elsewhere.

    Wire: docs/protocol.md, control channel.
    """

    type: ControlType
    payload: bytes = b""
    repeat: int = 1

    def encode(self) -> bytes:
        """Return the bytes of one SEND: header and payload.

        Raises:
            LocalProtocolError: the payload or repeat does not suit the type.
        """
        if not isinstance(self.type, ControlType):
            raise LocalProtocolError(f"control message type {self.type!r} is unknown")
        header = ControlHeader(len(self.payload), self.type, self.repeat).encode()
        if fault := _fault(self.type, len(self.payload), self.repeat):
            raise LocalProtocolError(fault)
        return header + self.payload

    @classmethod
    def decode(cls, data: bytes | memoryview) -> ControlMessage:
        """Decode exactly what a receive completion delivered.

        Args:
            data: as many bytes as the completion counted, no more of the buffer.

        Raises:
            RemoteProtocolError: an unknown type, or a byte count, length or repeat that does not
                suit it.
        """
        header = ControlHeader.decode(data)
        kind = _TYPES.get(header.type)
        if kind is None:
            raise RemoteProtocolError(
                f"control message type {header.type:#x} is unknown, allowed are 1 to 11"
            )
        if len(data) != CONTROL_HEADER_SIZE + header.length:
            raise RemoteProtocolError(
                f"{kind.name} arrived with {len(data)} bytes, "
                f"its header announces {CONTROL_HEADER_SIZE} + {header.length}"
            )
        if fault := _fault(kind, header.length, header.repeat):
            raise RemoteProtocolError(fault)
        return cls(kind, bytes(data[CONTROL_HEADER_SIZE:]), header.repeat)


def describe(message: ControlMessage) -> str:
    """Say in one line what a message is, for traces. Never raises on a decoded message."""
    text = f"{message.type.name} len={len(message.payload)} repeat={message.repeat}"
    try:
        detail = _describe_payload(message.type, message.payload)
    except ProtocolError as error:
        detail = f"broken: {error.message}"
    return f"{text} {detail}" if detail else text


def _describe_payload(kind: ControlType, payload: bytes) -> str:
    match kind:
        case ControlType.QEMU_FILE:
            return payload[:16].hex() + (".." if len(payload) > 16 else "")
        case ControlType.RAM_BLOCKS_RESULT:
            records = decode_ram_blocks(payload, None)
            return f"blocks={len(records)} bytes={sum(record.length for record in records)}"
        case ControlType.COMPRESS:
            run = ZeroRun.decode(payload)
            return (
                f"value={run.value} block={run.block_index} "
                f"offset={run.offset:#x} length={run.length:#x}"
            )
        case ControlType.REGISTER_REQUEST | ControlType.UNREGISTER_REQUEST:
            requests = decode_register_requests(payload)
            first = requests[0]
            more = f" (+{len(requests) - 1} records)" if len(requests) > 1 else ""
            return f"key={first.key:#x} block={first.block_index} chunks=+{first.chunks}{more}"
        case ControlType.REGISTER_RESULT:
            result = decode_register_results(payload)[0]
            return f"rkey={result.rkey:#x} host={result.host_address:#x}"
        case ControlType.FINAL_ACK:
            ack = FinalAck.decode(payload)
            return f"status={ack.status}" + (f" {ack.message}" if ack.message else "")
        case _:
            return ""
