# SPDX-License-Identifier: Apache-2.0
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.control import (
    CONTROL_HEADER_SIZE,
    CONTROL_MAX,
    CONTROL_MAX_PAYLOAD,
    MAX_REPEAT,
    ControlHeader,
    ControlMessage,
    ControlType,
    FinalAck,
    RamBlockRecord,
    RegisterRecord,
    RegisterResult,
    ZeroRun,
    describe,
    encode_ram_blocks,
)

U32 = st.integers(0, 2**32 - 1)
EMPTY = [
    ControlType.ERROR,
    ControlType.READY,
    ControlType.RAM_BLOCKS_REQUEST,
    ControlType.REGISTER_FINISHED,
    ControlType.UNREGISTER_FINISHED,
    ControlType.STREAM_END,
]
REQUESTS = [ControlType.REGISTER_REQUEST, ControlType.UNREGISTER_REQUEST]


def sized(kind, unit, most):
    return st.builds(
        lambda count, repeat, fill: ControlMessage(kind, bytes([fill]) * (count * unit), repeat),
        st.integers(1, most),
        U32,
        st.integers(0, 255),
    )


MESSAGES = st.one_of(
    st.builds(ControlMessage, st.sampled_from(EMPTY), st.just(b""), U32),
    sized(ControlType.QEMU_FILE, 1, 3000),
    sized(ControlType.RAM_BLOCKS_RESULT, 32, 40),
    sized(ControlType.REGISTER_RESULT, 16, 40),
    sized(ControlType.COMPRESS, 24, 1),
    st.builds(
        lambda kind, count: ControlMessage(kind, bytes(24 * count), count),
        st.sampled_from(REQUESTS),
        st.integers(1, 200),
    ),
    st.builds(
        lambda tail, repeat: ControlMessage(ControlType.FINAL_ACK, bytes(4) + tail, repeat),
        st.binary(max_size=1024),
        U32,
    ),
)


def raw(kind, payload=b"", repeat=1, length=None, padding=0):
    length = len(payload) if length is None else length
    return struct.pack(">IIII", length, kind, repeat, padding) + payload


def refused(data, match=None):
    with pytest.raises(RemoteProtocolError, match=match) as caught:
        ControlMessage.decode(data)
    assert type(caught.value) is RemoteProtocolError


@given(MESSAGES, U32)
def test_round_trip_whatever_the_padding(message, padding):
    data = message.encode()
    assert data == raw(message.type, message.payload, message.repeat)
    assert ControlMessage.decode(data) == message
    assert ControlMessage.decode(
        memoryview(data[:12] + struct.pack(">I", padding) + data[16:])
    ) == (message)


@given(MESSAGES, st.data())
def test_any_truncation_is_refused(message, data):
    encoded = message.encode()
    refused(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@given(MESSAGES, st.binary(min_size=1, max_size=40))
def test_any_extra_byte_is_refused(message, extra):
    refused(message.encode() + extra, "header announces")


@given(MESSAGES, st.integers(0, 2**32 - 1))
def test_another_length_is_refused(message, length):
    if length != len(message.payload):
        refused(raw(message.type, message.payload, message.repeat, length=length))


@given(st.integers(12, 2**32 - 1), st.binary(max_size=40))
def test_unknown_types_are_refused(kind, payload):
    if kind != ControlType.FINAL_ACK:
        refused(raw(kind, payload), f"type {kind:#x} is unknown")


@given(st.sampled_from(EMPTY), st.binary(min_size=1, max_size=40))
def test_messages_without_payload_carry_none(kind, payload):
    refused(raw(kind, payload), "allowed are 0")


@given(st.sampled_from(REQUESTS), st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_requests_hold_as_many_records_as_they_announce(kind, repeat, count):
    data = raw(kind, bytes(24 * count), repeat)
    if repeat == count and count:
        assert ControlMessage.decode(data).repeat == repeat
    else:
        refused(data)


def test_limits_of_repeat():
    payload = bytes(24 * MAX_REPEAT)
    data = raw(ControlType.REGISTER_REQUEST, payload, MAX_REPEAT)
    assert len(ControlMessage.decode(data).payload) == 98304
    refused(raw(7, payload + bytes(24), MAX_REPEAT + 1), "repeat 4097, allowed are 1 to 4096")
    refused(raw(7, b"", 0), "repeat 0, allowed are 1 to 4096")


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        (ControlType.NONE, [0, 1, 24]),
        (ControlType.QEMU_FILE, [0]),
        (ControlType.RAM_BLOCKS_RESULT, [0, 1, 31, 33, 48]),
        (ControlType.COMPRESS, [0, 23, 25, 48]),
        (ControlType.REGISTER_RESULT, [0, 1, 15, 17, 24]),
        (ControlType.FINAL_ACK, [0, 3, 1029]),
    ],
)
def test_lengths_that_do_not_suit_the_type(kind, lengths):
    for length in lengths:
        refused(raw(kind, bytes(length)))
        with pytest.raises(LocalProtocolError):
            ControlMessage(kind, bytes(length)).encode()


@pytest.mark.parametrize("length", [4, 1028])
def test_limits_of_the_final_acknowledgement(length):
    data = raw(ControlType.FINAL_ACK, bytes(length))
    assert ControlMessage.decode(data).encode() == data


def test_the_largest_message():
    data = ControlMessage(ControlType.QEMU_FILE, bytes(CONTROL_MAX_PAYLOAD)).encode()
    assert len(data) == CONTROL_MAX == 524288
    assert len(ControlMessage.decode(data).payload) == CONTROL_MAX_PAYLOAD
    refused(raw(ControlType.QEMU_FILE, bytes(CONTROL_MAX_PAYLOAD + 1)), "allowed are 0 to 524272")
    refused(raw(ControlType.QEMU_FILE, length=2**32 - 1))


@given(st.binary(max_size=120))
def test_any_bytes_decode_or_are_refused(data):
    try:
        message = ControlMessage.decode(data)
    except RemoteProtocolError:
        return
    assert ControlMessage.decode(message.encode()) == message


@given(st.integers(0, 11), st.integers(0, 5000), st.binary(max_size=120))
def test_any_payload_of_a_known_type_decodes_or_is_refused(kind, repeat, payload):
    try:
        message = ControlMessage.decode(raw(kind, payload, repeat))
    except RemoteProtocolError:
        return
    assert describe(message).startswith(ControlType(kind).name)


@pytest.mark.parametrize(
    "message",
    [
        ControlMessage(ControlType.READY, repeat=-1),
        ControlMessage(ControlType.READY, repeat=2**32),
        ControlMessage(ControlType.READY, b"x"),
        ControlMessage(ControlType.REGISTER_REQUEST, bytes(24), repeat=2),
        ControlMessage(ControlType.UNREGISTER_REQUEST, b"", repeat=0),
        ControlMessage(ControlType.QEMU_FILE, bytes(CONTROL_MAX_PAYLOAD + 1)),
        ControlMessage(3, b"x"),
        ControlMessage(99),
    ],
)
def test_bad_messages_are_not_encoded(message):
    with pytest.raises(LocalProtocolError):
        message.encode()


@given(st.builds(ControlHeader, st.integers(0, CONTROL_MAX_PAYLOAD), U32, U32))
def test_header_round_trip(header):
    assert len(header.encode()) == CONTROL_HEADER_SIZE
    assert ControlHeader.decode(header.encode() + b"payload") == header


@pytest.mark.parametrize(
    "header", [ControlHeader(-1, 1), ControlHeader(524273, 1), ControlHeader(0, 2**32)]
)
def test_bad_headers_are_not_encoded(header):
    with pytest.raises(LocalProtocolError):
        header.encode()


def message(kind, *records):
    return ControlMessage(kind, b"".join(record.encode() for record in records), len(records) or 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (message(ControlType.READY), "READY len=0 repeat=1"),
        (
            message(ControlType.COMPRESS, ZeroRun(0, 3, 0x100000, 0x20000)),
            "COMPRESS len=24 repeat=1 value=0 block=3 offset=0x100000 length=0x20000",
        ),
        (
            message(ControlType.REGISTER_REQUEST, RegisterRecord(0x2000, 1), RegisterRecord(0, 2)),
            "REGISTER_REQUEST len=48 repeat=2 key=0x2000 block=1 chunks=+0 (+1 records)",
        ),
        (
            message(ControlType.REGISTER_RESULT, RegisterResult(0x103, 0x7F00)),
            "REGISTER_RESULT len=16 repeat=1 rkey=0x103 host=0x7f00",
        ),
        (
            ControlMessage(
                ControlType.RAM_BLOCKS_RESULT,
                encode_ram_blocks([RamBlockRecord(0, 0, 4096, 0), RamBlockRecord(0, 0, 8192, 0)]),
            ),
            "RAM_BLOCKS_RESULT len=64 repeat=1 blocks=2 bytes=12288",
        ),
        (
            message(ControlType.FINAL_ACK, FinalAck(1, "disk full")),
            "FINAL_ACK len=13 repeat=1 status=1 disk full",
        ),
        (
            ControlMessage(ControlType.QEMU_FILE, b"QEVM" * 5),
            "QEMU_FILE len=20 repeat=1 " + "5145564d" * 4 + "..",
        ),
        (
            ControlMessage(ControlType.QEMU_FILE, b"QEVM" * 4),
            "QEMU_FILE len=16 repeat=1 " + "5145564d" * 4,
        ),
        (
            ControlMessage(ControlType.REGISTER_RESULT, bytes(16)),
            "REGISTER_RESULT len=16 repeat=1 broken: register result rkey is 0, "
            "allowed are 1 to 2^32 - 1",
        ),
    ],
)
def test_description_for_traces(value, text):
    assert describe(value) == text
