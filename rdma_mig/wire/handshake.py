# SPDX-License-Identifier: Apache-2.0
"""The private data that REQ and REP of the RDMA connection carry.

Wire: docs/protocol.md, handshake and the extension block.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.fields import check_uint

__all__ = [
    "EXTENDED_PRIVATE_DATA_SIZE",
    "FEATURE_FINAL_ACK",
    "FEATURE_FRESH_BLOCKS",
    "FLAG_EXTENSION",
    "FLAG_PIN_ALL",
    "MAX_CONNECTIONS",
    "PRIVATE_DATA_SIZE",
    "PROTOCOL_VERSION",
    "Extension",
    "PrivateData",
]

PROTOCOL_VERSION = 1
#: All RAM of both sides is registered during setup; active when REQ and REP both carry it.
FLAG_PIN_ALL = 0x1
#: Bytes 8 to 55 hold an :class:`Extension` (ours; QEMU drops flags that it does not know).
FLAG_EXTENSION = 0x8000_0000
#: Bytes that QEMU sends and reads.
PRIVATE_DATA_SIZE = 8
#: Bytes with an extension: all that a REQ can carry in the TCP port space.
EXTENDED_PRIVATE_DATA_SIZE = 56
#: The destination ends with a FINAL_ACK control message.
FEATURE_FINAL_ACK = 0x1
#: RAM_BLOCKS_RESULT says which blocks are all zero; zeros need not be sent to those.
FEATURE_FRESH_BLOCKS = 0x2
#: Connections that may share one migration's RAM, the first counted.
MAX_CONNECTIONS = 16

_BASE = struct.Struct(">II")
_BLOCK = struct.Struct(">4sHHIQHH20x")
_CRC = struct.Struct(">I")
_MAGIC = b"RMIG"
_BLOCK_VERSION = 1


@dataclass(frozen=True, slots=True)
class Extension:
    """What two of our own ends tell each other beside QEMU's eight bytes.

    Args:
        features: u32, one bit per feature (``FEATURE_*``); unknown bits are kept and mean nothing.
        nonce: u64 that tells one migration from another.
        beside: u16, connections for RAM beside the first: as many as the source wants (REQ), or as
            the destination takes (REP).
        number: u16, 0 in the first connection and in the return path's, else which one of those
            beside the first this is, from 1.

    Wire: docs/protocol.md, the extension block.
    """

    features: int
    nonce: int
    beside: int = 0
    number: int = 0

    def encode(self, base: bytes) -> bytes:
        """Return the 48 bytes that follow *base*, the 8 bytes that the checksum covers as well.

        Raises:
            LocalProtocolError: a field does not fit, or *base* is not 8 bytes.
        """
        check_uint("extension features", self.features, 32)
        check_uint("extension nonce", self.nonce, 64)
        check_uint("extension connections", self.beside, 16)
        check_uint("extension connection number", self.number, 16)
        if len(base) != PRIVATE_DATA_SIZE:
            raise LocalProtocolError(f"extension follows {len(base)} bytes, allowed are 8")
        block = _BLOCK.pack(
            _MAGIC, _BLOCK_VERSION, 0, self.features, self.nonce, self.beside, self.number
        )
        return block + _CRC.pack(zlib.crc32(base + block))

    @classmethod
    def decode(cls, data: bytes) -> Extension | None:
        """Find the block in whole private data; None where there is none that we understand.

        That is no error: what follows QEMU's eight bytes may be padding, and padding may be
        garbage.
        """
        data = bytes(data)
        if len(data) < EXTENDED_PRIVATE_DATA_SIZE:
            return None
        crc_at = EXTENDED_PRIVATE_DATA_SIZE - _CRC.size
        magic, version, _reserved, *fields = _BLOCK.unpack_from(data, PRIVATE_DATA_SIZE)
        (crc,) = _CRC.unpack_from(data, crc_at)
        if magic != _MAGIC or version != _BLOCK_VERSION or crc != zlib.crc32(data[:crc_at]):
            return None
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class PrivateData:
    """Private data of a REQ or REP.

    Args:
        version: protocol version; only 1 exists.
        flags: u32 without FLAG_EXTENSION, which stands and falls with *extension*. Unknown bits
            of a peer are kept; a reply must carry only those that are known (``FLAG_PIN_ALL``).
        extension: present between our own ends. A REP may carry one only if its REQ did.

    Wire: docs/protocol.md, handshake.
    """

    version: int
    flags: int
    extension: Extension | None = None

    @property
    def pin_all(self) -> bool:
        """Whether this side asks for (REQ) or grants (REP) pin-all."""
        return bool(self.flags & FLAG_PIN_ALL)

    def encode(self) -> bytes:
        """Return the bytes for the connection manager: 8, or 56 with an extension.

        Raises:
            LocalProtocolError: a version other than 1, flags that do not fit, or FLAG_EXTENSION
                without an extension.
        """
        if self.version != PROTOCOL_VERSION:
            raise LocalProtocolError(f"private data version is {self.version!r}, allowed is 1")
        check_uint("private data flags", self.flags, 32)
        if self.extension is None:
            if self.flags & FLAG_EXTENSION:
                raise LocalProtocolError("private data flags announce an extension, none is given")
            return _BASE.pack(self.version, self.flags)
        base = _BASE.pack(self.version, self.flags | FLAG_EXTENSION)
        return base + self.extension.encode(base)

    @classmethod
    def decode(cls, data: bytes) -> PrivateData:
        """Decode private data as a connection event delivers it, padding included.

        Args:
            data: at least 8 bytes (56 arrive in a REQ, 196 in a REP); the rest may be garbage.

        Raises:
            RemoteProtocolError: fewer than 8 bytes, or a version other than 1.
        """
        if len(data) < PRIVATE_DATA_SIZE:
            raise RemoteProtocolError(
                f"private data has {len(data)} bytes, at least {PRIVATE_DATA_SIZE} are needed",
                remedy="check that the peer is a migration over RDMA and not another service",
            )
        version, flags = _BASE.unpack_from(data)
        if version != PROTOCOL_VERSION:
            raise RemoteProtocolError(
                f"private data version is {version}, allowed is {PROTOCOL_VERSION}",
                remedy="check that the peer is a migration over RDMA and not another service",
            )
        extension = Extension.decode(data) if flags & FLAG_EXTENSION else None
        return cls(version, flags & ~FLAG_EXTENSION, extension)
