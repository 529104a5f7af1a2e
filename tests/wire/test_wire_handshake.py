# SPDX-License-Identifier: Apache-2.0
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.handshake import (
    FEATURE_FINAL_ACK,
    FLAG_EXTENSION,
    FLAG_PIN_ALL,
    Extension,
    PrivateData,
)

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
FLAGS = st.integers(0, 2**31 - 1)
EXTENSIONS = st.builds(Extension, U32, U64, U16, U16)
VALUES = st.builds(PrivateData, st.just(1), FLAGS, st.none() | EXTENSIONS)


def test_bytes_of_qemu():
    assert PrivateData(1, FLAG_PIN_ALL).encode().hex() == "0000000100000001"
    assert PrivateData(1, 0).encode().hex() == "0000000100000000"
    assert PrivateData.decode(bytes.fromhex("0000000100000001")).pin_all
    assert not PrivateData.decode(bytes.fromhex("0000000100000000")).pin_all


def test_bytes_of_the_extension():
    data = PrivateData(1, FLAG_PIN_ALL, Extension(FEATURE_FINAL_ACK, 0x1122334455667788)).encode()
    start = bytes.fromhex("0000000180000001 524d4947 0001 0000 00000001 1122334455667788")
    assert data[:28] == start
    assert data[28:52] == bytes(24)
    assert data[52:] == struct.pack(">I", zlib.crc32(data[:52]))
    assert len(data) == 56
    third_of_four = PrivateData(1, 0, Extension(0, 1, beside=3, number=2)).encode()
    assert third_of_four[28:52] == bytes.fromhex("0003 0002") + bytes(20)


@given(VALUES, st.binary(max_size=200))
def test_round_trip_with_any_padding(value, padding):
    data = value.encode()
    assert len(data) == (8 if value.extension is None else 56)
    assert PrivateData.decode(data + padding) == value


@given(st.binary(max_size=7))
def test_truncation_is_refused(data):
    with pytest.raises(RemoteProtocolError, match="at least 8"):
        PrivateData.decode(data)


@given(U32.filter(lambda version: version != 1), U32, st.binary(max_size=60))
def test_other_versions_are_refused(version, flags, padding):
    with pytest.raises(RemoteProtocolError, match=f"version is {version}, allowed is 1"):
        PrivateData.decode(struct.pack(">II", version, flags) + padding)


@given(EXTENSIONS, st.integers(8, 55), st.integers(1, 255))
def test_a_damaged_extension_is_padding(extension, at, flip):
    data = bytearray(PrivateData(1, FLAG_PIN_ALL, extension).encode())
    data[at] ^= flip
    assert PrivateData.decode(bytes(data)) == PrivateData(1, FLAG_PIN_ALL, None)


@given(EXTENSIONS, st.integers(8, 55))
def test_a_cut_extension_is_padding(extension, size):
    assert PrivateData.decode(PrivateData(1, 0, extension).encode()[:size]).extension is None


def test_an_extension_of_another_version_is_padding():
    base = struct.pack(">II", 1, FLAG_EXTENSION)
    block = base + struct.pack(">4sHHIQ24x", b"RMIG", 2, 0, 1, 1)
    assert PrivateData.decode(block + struct.pack(">I", zlib.crc32(block))).extension is None


def test_without_the_flag_there_is_no_extension():
    data = bytearray(PrivateData(1, 0, Extension(1, 2)).encode())
    data[4] &= 0x7F
    # Not even when the checksum suits.
    data[52:] = struct.pack(">I", zlib.crc32(data[:52]))
    assert PrivateData.decode(bytes(data)) == PrivateData(1, 0)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data):
    try:
        PrivateData.decode(data)
    except RemoteProtocolError:
        assert len(data) < 8 or data[:4] != b"\0\0\0\1"


@pytest.mark.parametrize(
    "value",
    [
        PrivateData(0, 0),
        PrivateData(2, 0),
        PrivateData(1, -1),
        PrivateData(1, 2**32),
        PrivateData(1, FLAG_EXTENSION),
        PrivateData(1, 0, Extension(2**32, 0)),
        PrivateData(1, 0, Extension(-1, 0)),
        PrivateData(1, 0, Extension(0, 2**64)),
        PrivateData(1, 0, Extension(0, 0, 2**16)),
        PrivateData(1, 0, Extension(0, 0, 0, -1)),
        PrivateData(1, "x"),
    ],
)
def test_bad_values_are_not_encoded(value):
    with pytest.raises(LocalProtocolError):
        value.encode()
