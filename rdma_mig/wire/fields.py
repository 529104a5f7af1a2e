# SPDX-License-Identifier: Apache-2.0
"""Checks that every codec shares: integers that fit, text that can be shown to an operator."""

from __future__ import annotations

from rdma_mig.errors import LocalProtocolError, ProtocolError, RemoteProtocolError

__all__ = [
    "U16_MAX",
    "U32_MAX",
    "U64_END",
    "check_uint",
    "checked_text",
    "decode_text",
    "encode_text",
]

U16_MAX = 0xFFFF
U32_MAX = 0xFFFF_FFFF
#: One past the largest unsigned 64-bit value: where an address range may end at the latest.
U64_END = 1 << 64


def check_uint(field: str, value: int, bits: int) -> None:
    """Refuse to encode a value that is no unsigned integer of *bits* bits.

    Raises:
        LocalProtocolError: naming *field*.
    """
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise LocalProtocolError(f"{field} is {value!r}, allowed are 0 to 2^{bits} - 1")


def checked_text(field: str, text: str, limit: int, error: type[ProtocolError]) -> str:
    """Return *text* when it is 1 to *limit* bytes of printable UTF-8.

    Names from a peer end up in messages on a terminal and in file contents, so control
    characters are refused here, once.

    Raises:
        ProtocolError: of the kind *error*.
    """
    if not isinstance(text, str) or not text:
        raise error(f"{field} is empty")
    # isprintable is false for surrogates too, so the encoding below cannot fail.
    if not text.isprintable():
        raise error(f"{field} {text[:64]!r} has characters that cannot be printed")
    if len(text.encode()) > limit:
        raise error(f"{field} {text[:64]!r}... is longer than {limit} bytes")
    return text


def decode_text(field: str, raw: bytes, limit: int) -> str:
    """Decode a name from a peer: 1 to *limit* bytes of printable UTF-8.

    Raises:
        RemoteProtocolError: naming *field*.
    """
    try:
        text = bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise RemoteProtocolError(f"{field} {bytes(raw[:64])!r} is not UTF-8") from None
    return checked_text(field, text, limit, RemoteProtocolError)


def encode_text(field: str, text: str, limit: int) -> bytes:
    """Encode a name: 1 to *limit* bytes of printable UTF-8.

    Raises:
        LocalProtocolError: naming *field*.
    """
    return checked_text(field, text, limit, LocalProtocolError).encode()
