# SPDX-License-Identifier: Apache-2.0
"""The part of a stream behind its RAM: a value, and how a machine of one device makes it.

Wire: docs/protocol.md, stream; end of stream.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.fields import encode_text
from rdma_mig.wire.stream_format import (
    QEMU_VM_EOF,
    QEMU_VM_SECTION_FOOTER,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_VMDESCRIPTION,
    STR8_MAX,
    U8,
    U32,
    encode_footer,
)

__all__ = ["DeviceState", "decode_sole_device", "encode_sole_device"]

_FOOTER_SIZE = 5


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Everything behind the RAM section's end, verbatim.

    Attributes:
        raw: sections, the EOF byte, and the description where there is one.
        eof_offset: offset in ``raw`` right behind the EOF byte.
        footers: whether sections end with footers.
    """

    raw: bytes
    eof_offset: int
    footers: bool = True

    def __post_init__(self) -> None:
        end = self.eof_offset
        if not 1 <= end <= len(self.raw) or self.raw[end - 1] != QEMU_VM_EOF:
            raise LocalProtocolError(f"device state has no EOF byte before its offset {end}")


def encode_sole_device(
    idstr: str, payload: bytes, *, section_id: int, version: int = 1
) -> DeviceState:
    """Return the section of one device that holds opaque bytes, EOF, and a description of it.

    Args:
        idstr: name of the device, 1 to 255 bytes.
        payload: its state, up to 4 GiB.
        section_id: u32, another than RAM's.
        version: of the payload's format, u32.

    Raises:
        LocalProtocolError: a value that does not fit.
    """
    name = encode_text("device name", idstr, STR8_MAX)
    if len(payload) >= 1 << 32:
        raise LocalProtocolError(f"device state has {len(payload)} bytes, allowed are 2^32 - 1")
    description = json.dumps(
        {
            "page_size": 4096,
            "devices": [
                {
                    "name": idstr,
                    "instance_id": 0,
                    "vmsd_name": idstr,
                    "version": version,
                    "fields": [{"name": "state", "type": "buffer", "size": 4 + len(payload)}],
                }
            ],
        }
    ).encode()
    sections = b"".join(
        (
            U8.pack(QEMU_VM_SECTION_FULL) + U32.pack(section_id),
            U8.pack(len(name)) + name,
            U32.pack(0) + U32.pack(version),
            U32.pack(len(payload)) + payload,
            encode_footer(section_id),
            U8.pack(QEMU_VM_EOF),
        )
    )
    header = U8.pack(QEMU_VM_VMDESCRIPTION) + U32.pack(len(description))
    return DeviceState(sections + header + description, len(sections))


def decode_sole_device(state: DeviceState, idstr: str, *, version: int = 1) -> bytes:
    """Return the payload of `encode_sole_device`.

    Raises:
        RemoteProtocolError: it holds anything else.
    """
    raw = state.raw[: state.eof_offset]
    name = encode_text("device name", idstr, STR8_MAX)
    head = U8.pack(len(name)) + name + U32.pack(0) + U32.pack(version)
    at = 5 + len(head)
    if raw[:1] != U8.pack(QEMU_VM_SECTION_FULL) or raw[5:at] != head or len(raw) < at + 4:
        raise RemoteProtocolError(
            f"device state begins with {raw[:24].hex()}, awaited was the one device "
            f"{idstr!r} of version {version}"
        )
    size = int.from_bytes(raw[at : at + 4], "big")
    end = at + 4 + size
    if len(raw) != end + _FOOTER_SIZE + 1:
        raise RemoteProtocolError(
            f"device {idstr!r} announces {size} bytes, its section has {len(raw) - at - 10}"
        )
    if raw[end] != QEMU_VM_SECTION_FOOTER or raw[end + 1 : end + 5] != raw[1:5]:
        raise RemoteProtocolError(f"the section of device {idstr!r} has no footer of its own")
    return raw[at + 4 : end]
