# SPDX-License-Identifier: Apache-2.0
"""Records that control messages carry, and their checks against the agreed RAM blocks.

Decoding a record checks what the record alone can show; :func:`check_register`,
:func:`check_unregister` and :func:`check_zero_run` check it against the blocks, and must be
called before any address is used.

Wire: docs/protocol.md, payloads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.fields import U64_END, check_uint, checked_text

__all__ = [
    "CHUNK_SIZE",
    "FINAL_ACK_MESSAGE_MAX",
    "MAX_RAM_BLOCKS",
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
    "encode_ram_blocks",
]

#: Bytes of a chunk, the unit of dynamic registration, counted from the start of its RAM block.
CHUNK_SIZE = 1 << 20
#: Records that fit one RAM_BLOCKS_RESULT of 512 KiB.
MAX_RAM_BLOCKS = 16383
#: Bytes of text that a FINAL_ACK may carry.
FINAL_ACK_MESSAGE_MAX = 1024


def _need(name: str, data: bytes | memoryview, size: int) -> None:
    if len(data) != size:
        raise RemoteProtocolError(f"{name} has {len(data)} bytes, allowed are {size}")


@dataclass(frozen=True, slots=True)
class RamBlockRecord:
    """One RAM block of the destination, 32 bytes of a RAM_BLOCKS_RESULT.

    Args:
        host_address: u64, the destination's virtual address of the block's first byte.
        offset: u64, where the block starts in the destination's own RAM address space.
        length: bytes, at least 1.
        rkey: u32, key of the whole block with pin-all, else 0.
        fresh: the block is all zero. Between our own ends only, where both have
            FEATURE_FRESH_BLOCKS: in what a QEMU sends this is padding, and means nothing.

    Wire: docs/protocol.md, payloads, and the extension block.
    """

    SIZE: ClassVar[int] = 32
    _FORMAT: ClassVar[struct.Struct] = struct.Struct(">QQQI4s")
    _FRESH: ClassVar[bytes] = b"ZERO"

    host_address: int
    offset: int
    length: int
    rkey: int
    fresh: bool = False

    def _fault(self) -> str:
        if self.length == 0:
            return "RAM block length is 0, at least 1 is needed"
        if self.host_address + self.length > U64_END:
            return f"RAM block at {self.host_address:#x} of {self.length:#x} bytes passes 2^64"
        if self.offset + self.length > U64_END:
            return f"RAM block offset {self.offset:#x} + {self.length:#x} bytes passes 2^64"
        return ""

    def encode(self) -> bytes:
        """Return 32 bytes.

        Raises:
            LocalProtocolError: a field does not fit, or the block passes the end of the space.
        """
        check_uint("RAM block host address", self.host_address, 64)
        check_uint("RAM block offset", self.offset, 64)
        check_uint("RAM block length", self.length, 64)
        check_uint("RAM block rkey", self.rkey, 32)
        if fault := self._fault():
            raise LocalProtocolError(fault)
        padding = self._FRESH if self.fresh else b""
        return self._FORMAT.pack(self.host_address, self.offset, self.length, self.rkey, padding)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> RamBlockRecord:
        """Decode exactly 32 bytes.

        Raises:
            RemoteProtocolError: another size, length 0, or a range past 2^64.
        """
        _need("RAM block record", data, cls.SIZE)
        address, offset, length, rkey, padding = cls._FORMAT.unpack(data)
        record = cls(address, offset, length, rkey, padding == cls._FRESH)
        if fault := record._fault():
            raise RemoteProtocolError(fault)
        return record


def encode_ram_blocks(records: Sequence[RamBlockRecord]) -> bytes:
    """Return the payload of a RAM_BLOCKS_RESULT: one record per block, in stream order.

    Raises:
        LocalProtocolError: no record, more than 16383, or one that does not fit.
    """
    if not 1 <= len(records) <= MAX_RAM_BLOCKS:
        raise LocalProtocolError(f"{len(records)} RAM blocks, allowed are 1 to {MAX_RAM_BLOCKS}")
    return b"".join(record.encode() for record in records)


def decode_ram_blocks(
    payload: bytes | memoryview, expected_lengths: Sequence[int] | None
) -> list[RamBlockRecord]:
    """Decode the payload of a RAM_BLOCKS_RESULT.

    Args:
        payload: what follows the control header.
        expected_lengths: bytes of each of our own blocks in stream order; None checks none.

    Raises:
        RemoteProtocolError: a broken record, another count of blocks, or another length.
    """
    size = RamBlockRecord.SIZE
    count = len(payload) // size
    if len(payload) % size or not 1 <= count <= MAX_RAM_BLOCKS:
        raise RemoteProtocolError(
            f"RAM_BLOCKS_RESULT has {len(payload)} bytes, "
            f"allowed are 1 to {MAX_RAM_BLOCKS} records of {size}"
        )
    remedy = "start the destination with the machine, memory size and devices of the source"
    if expected_lengths is not None and count != len(expected_lengths):
        raise RemoteProtocolError(
            f"RAM_BLOCKS_RESULT has {count} blocks, the source has {len(expected_lengths)}",
            remedy=remedy,
        )
    records = []
    for index in range(count):
        try:
            record = RamBlockRecord.decode(payload[index * size : (index + 1) * size])
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"block {index}: {error.message}") from None
        if expected_lengths is not None and record.length != expected_lengths[index]:
            raise RemoteProtocolError(
                f"RAM block {index} has {record.length} bytes at the destination, "
                f"{expected_lengths[index]} at the source",
                remedy=remedy,
            )
        records.append(record)
    return records


@dataclass(frozen=True, slots=True)
class RegisterRecord:
    """What a REGISTER_REQUEST or UNREGISTER_REQUEST names, 24 bytes a record.

    Args:
        key: u64. REGISTER: address of the first byte to be written, in the destination's RAM
            address space (block offset + offset in the block). UNREGISTER: number of the chunk.
        block_index: u32, index in stream order.
        chunks: u64, chunks **beyond** the first.

    Wire: docs/protocol.md, payloads.
    """

    SIZE: ClassVar[int] = 24
    _FORMAT: ClassVar[struct.Struct] = struct.Struct(">QI4xQ")

    key: int
    block_index: int
    chunks: int = 0

    def encode(self) -> bytes:
        """Return 24 bytes.

        Raises:
            LocalProtocolError: a field does not fit.
        """
        check_uint("register key", self.key, 64)
        check_uint("register block index", self.block_index, 32)
        check_uint("register chunks", self.chunks, 64)
        return self._FORMAT.pack(self.key, self.block_index, self.chunks)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> RegisterRecord:
        """Decode exactly 24 bytes; padding is ignored.

        Raises:
            RemoteProtocolError: another size.
        """
        _need("register record", data, cls.SIZE)
        return cls(*cls._FORMAT.unpack(data))


def decode_register_requests(payload: bytes | memoryview) -> list[RegisterRecord]:
    """Decode all records of a REGISTER_REQUEST or UNREGISTER_REQUEST.

    Raises:
        RemoteProtocolError: no whole number of records, or none.
    """
    size = RegisterRecord.SIZE
    if not payload or len(payload) % size:
        raise RemoteProtocolError(
            f"register request has {len(payload)} bytes, allowed are multiples of {size}"
        )
    return [RegisterRecord.decode(payload[at : at + size]) for at in range(0, len(payload), size)]


@dataclass(frozen=True, slots=True)
class RegisterResult:
    """The answer to one REGISTER_REQUEST record, 16 bytes.

    Args:
        rkey: u32, never 0, which a QEMU source takes for "not registered".
        host_address: u64, the destination's virtual address of the **block's** first byte.

    Wire: docs/protocol.md, payloads.
    """

    SIZE: ClassVar[int] = 16
    _FORMAT: ClassVar[struct.Struct] = struct.Struct(">I4xQ")

    rkey: int
    host_address: int

    def encode(self) -> bytes:
        """Return 16 bytes.

        Raises:
            LocalProtocolError: a field does not fit, or the key is 0.
        """
        check_uint("register result rkey", self.rkey, 32)
        check_uint("register result host address", self.host_address, 64)
        if self.rkey == 0:
            raise LocalProtocolError("register result rkey is 0, allowed are 1 to 2^32 - 1")
        return self._FORMAT.pack(self.rkey, self.host_address)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> RegisterResult:
        """Decode exactly 16 bytes; padding is ignored.

        Raises:
            RemoteProtocolError: another size, or a key of 0.
        """
        _need("register result", data, cls.SIZE)
        result = cls(*cls._FORMAT.unpack(data))
        if result.rkey == 0:
            raise RemoteProtocolError("register result rkey is 0, allowed are 1 to 2^32 - 1")
        return result


def decode_register_results(payload: bytes | memoryview) -> list[RegisterResult]:
    """Decode all records of a REGISTER_RESULT (QEMU transmits one, whatever was asked).

    Raises:
        RemoteProtocolError: no whole number of records, none, or a key of 0.
    """
    size = RegisterResult.SIZE
    if not payload or len(payload) % size:
        raise RemoteProtocolError(
            f"register result has {len(payload)} bytes, allowed are multiples of {size}"
        )
    return [RegisterResult.decode(payload[at : at + size]) for at in range(0, len(payload), size)]


@dataclass(frozen=True, slots=True)
class ZeroRun:
    """A run of zeros in one RAM block, the 24-byte payload of COMPRESS.

    Args:
        value: u32 fill byte; only 0 is accepted by every QEMU, and by us.
        block_index: u32, index in stream order.
        offset: u64, address of the first byte in the destination's RAM address space.
        length: bytes, at least 1.

    Wire: docs/protocol.md, payloads.
    """

    SIZE: ClassVar[int] = 24
    _FORMAT: ClassVar[struct.Struct] = struct.Struct(">IIQQ")

    value: int
    block_index: int
    offset: int
    length: int

    def encode(self) -> bytes:
        """Return 24 bytes.

        Raises:
            LocalProtocolError: a field does not fit, the value is not 0 or the length is 0.
        """
        check_uint("zero run value", self.value, 32)
        check_uint("zero run block index", self.block_index, 32)
        check_uint("zero run offset", self.offset, 64)
        check_uint("zero run length", self.length, 64)
        if self.value:
            raise LocalProtocolError(f"zero run value is {self.value}, allowed is 0")
        if not self.length or self.offset + self.length > U64_END:
            raise LocalProtocolError(
                f"zero run at {self.offset:#x} has {self.length:#x} bytes, "
                "allowed are 1 up to the end at 2^64"
            )
        return self._FORMAT.pack(self.value, self.block_index, self.offset, self.length)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> ZeroRun:
        """Decode exactly 24 bytes; :func:`check_zero_run` judges the values.

        Raises:
            RemoteProtocolError: another size.
        """
        _need("zero run", data, cls.SIZE)
        return cls(*cls._FORMAT.unpack(data))


@dataclass(frozen=True, slots=True)
class FinalAck:
    """How a migration between our own ends ended at the destination.

    Args:
        status: u32, 0 when RAM and device state are whole (and on disk, where that was asked).
        message: at most 1024 bytes of UTF-8 for the operator, may be empty.

    Wire: docs/protocol.md, the extension block.
    """

    _FORMAT: ClassVar[struct.Struct] = struct.Struct(">I")

    status: int
    message: str = ""

    @classmethod
    def fitted(cls, status: int, text: str) -> FinalAck:
        """Make one from any text: unprintable characters become spaces, the end is cut off."""
        text = "".join(char if char.isprintable() else " " for char in text)
        return cls(status, text.encode()[:FINAL_ACK_MESSAGE_MAX].decode("utf-8", "ignore"))

    def encode(self) -> bytes:
        """Return the payload, 4 to 1028 bytes.

        Raises:
            LocalProtocolError: the status does not fit or the message is too long or unprintable.
        """
        check_uint("final acknowledgement status", self.status, 32)
        if self.message != "":
            checked_text(
                "final acknowledgement message",
                self.message,
                FINAL_ACK_MESSAGE_MAX,
                LocalProtocolError,
            )
        return self._FORMAT.pack(self.status) + self.message.encode()

    @classmethod
    def decode(cls, data: bytes | memoryview) -> FinalAck:
        """Decode a whole payload.

        Characters that cannot be printed become spaces: the message is for a terminal.

        Raises:
            RemoteProtocolError: fewer than 4 or more than 1028 bytes, or no UTF-8.
        """
        data = bytes(data)
        most = cls._FORMAT.size + FINAL_ACK_MESSAGE_MAX
        if not cls._FORMAT.size <= len(data) <= most:
            raise RemoteProtocolError(
                f"final acknowledgement has {len(data)} bytes, allowed are 4 to {most}"
            )
        (status,) = cls._FORMAT.unpack_from(data)
        try:
            text = data[cls._FORMAT.size :].decode("utf-8")
        except UnicodeDecodeError:
            raise RemoteProtocolError("final acknowledgement message is not UTF-8") from None
        return cls(status, "".join(char if char.isprintable() else " " for char in text))


def chunk_count(length: int) -> int:
    """Chunks of a RAM block of *length* bytes."""
    return (length + CHUNK_SIZE - 1) // CHUNK_SIZE


def _block(what: str, index: int, blocks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    if not 0 <= index < len(blocks):
        raise RemoteProtocolError(f"{what} names block {index}, there are {len(blocks)}")
    return blocks[index]


def _chunks(what: str, record: RegisterRecord, first: int, length: int) -> range:
    count = chunk_count(length)
    # Python's integers do not wrap, so a huge count is simply larger than the block.
    if not 0 <= first < count or record.chunks >= count - first:
        raise RemoteProtocolError(
            f"{what} asks for chunks {first} to {first + record.chunks} "
            f"of block {record.block_index}, which has {count}"
        )
    return range(first, first + record.chunks + 1)


def check_register(record: RegisterRecord, blocks: Sequence[tuple[int, int]]) -> range:
    """Return the chunks that a REGISTER_REQUEST record asks for.

    Args:
        record: from the peer.
        blocks: (offset that we announced, length in bytes) of each block in stream order.

    Raises:
        RemoteProtocolError: index, address or number of chunks outside the blocks.
    """
    what = "REGISTER_REQUEST"
    offset, length = _block(what, record.block_index, blocks)
    if not offset <= record.key < offset + length:
        raise RemoteProtocolError(
            f"{what} has address {record.key:#x} for block {record.block_index}, "
            f"allowed are {offset:#x} to {offset + length - 1:#x}"
        )
    return _chunks(what, record, (record.key - offset) // CHUNK_SIZE, length)


def check_unregister(record: RegisterRecord, blocks: Sequence[tuple[int, int]]) -> range:
    """Return the chunks that an UNREGISTER_REQUEST record gives back; its key is a chunk number.

    Args:
        record: from the peer.
        blocks: (offset, length in bytes) of each block in stream order.

    Raises:
        RemoteProtocolError: index or chunks outside the blocks.
    """
    what = "UNREGISTER_REQUEST"
    _offset, length = _block(what, record.block_index, blocks)
    return _chunks(what, record, record.key, length)


def check_zero_run(run: ZeroRun, blocks: Sequence[tuple[int, int]]) -> int:
    """Return the offset within its block, in bytes, where a zero run starts.

    Args:
        run: from the peer.
        blocks: (offset that we announced, length in bytes) of each block in stream order.

    Raises:
        RemoteProtocolError: index or range outside the blocks, or a value other than 0.
    """
    what = "COMPRESS"
    offset, length = _block(what, run.block_index, blocks)
    if run.value:
        raise RemoteProtocolError(f"{what} has fill value {run.value:#x}, allowed is 0")
    if not run.length or run.offset < offset or run.offset + run.length > offset + length:
        raise RemoteProtocolError(
            f"{what} covers {run.length:#x} bytes at {run.offset:#x} of block {run.block_index}, "
            f"allowed are {offset:#x} to {offset + length - 1:#x}"
        )
    return run.offset - offset
