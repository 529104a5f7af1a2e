# SPDX-License-Identifier: Apache-2.0
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.control import (
    CHUNK_SIZE,
    MAX_RAM_BLOCKS,
    FinalAck,
    RamBlockRecord,
    RegisterRecord,
    RegisterResult,
    ZeroRun,
    check_register,
    check_unregister,
    check_zero_run,
    decode_ram_blocks,
    decode_register_requests,
    decode_register_results,
    encode_ram_blocks,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
HALF = st.integers(0, 2**63)

RAM_BLOCKS = st.builds(RamBlockRecord, HALF, HALF, st.integers(1, 2**63), U32)
RESULTS = st.builds(RegisterResult, st.integers(1, 2**32 - 1), U64)
REGISTERS = st.builds(RegisterRecord, U64, U32, U64)
ZERO_RUNS = st.builds(ZeroRun, st.just(0), U32, HALF, st.integers(1, 2**63))
TEXTS = st.text(max_size=300).filter(str.isprintable)
ACKS = st.builds(FinalAck, U32, TEXTS).filter(lambda ack: len(ack.message.encode()) <= 1024)
RECORDS = st.one_of(RAM_BLOCKS, RESULTS, REGISTERS, ZERO_RUNS)

# Two blocks as a destination announces them; the second is no whole number of chunks.
BLOCKS = [(0, 4 * CHUNK_SIZE), (0x10000000, CHUNK_SIZE + 4096)]


@given(RECORDS)
def test_round_trip(record):
    data = record.encode()
    assert len(data) == record.SIZE
    assert type(record).decode(data) == record
    assert type(record).decode(memoryview(data)) == record


@given(RECORDS, st.integers(0, 40))
def test_any_other_size_is_refused(record, size):
    data = record.encode().ljust(40, b"\0")[:size]
    if size != record.SIZE:
        with pytest.raises(RemoteProtocolError, match="allowed are"):
            type(record).decode(data)


def test_layouts():
    assert RamBlockRecord(1, 2, 3, 4).encode() == struct.pack(">QQQII", 1, 2, 3, 4, 0)
    assert RegisterRecord(1, 2, 3).encode() == struct.pack(">QIIQ", 1, 2, 0, 3)
    assert RegisterResult(1, 2).encode() == struct.pack(">IIQ", 1, 0, 2)
    assert ZeroRun(0, 1, 2, 3).encode() == struct.pack(">IIQQ", 0, 1, 2, 3)
    assert FinalAck(1, "ß").encode() == b"\0\0\0\1\xc3\x9f"
    # Padding is not looked at.
    assert RamBlockRecord.decode(struct.pack(">QQQII", 1, 2, 3, 4, 9)) == RamBlockRecord(1, 2, 3, 4)
    assert RegisterRecord.decode(struct.pack(">QIIQ", 1, 2, 9, 3)) == RegisterRecord(1, 2, 3)
    assert RegisterResult.decode(struct.pack(">IIQ", 1, 9, 2)) == RegisterResult(1, 2)


@pytest.mark.parametrize(
    "record",
    [
        RamBlockRecord(-1, 0, 1, 0),
        RamBlockRecord(0, 2**64, 1, 0),
        RamBlockRecord(0, 0, 0, 0),
        RamBlockRecord(2**64 - 1, 0, 2, 0),
        RamBlockRecord(0, 2**64 - 1, 2, 0),
        RamBlockRecord(0, 0, 1, 2**32),
        RegisterRecord(-1, 0, 0),
        RegisterRecord(0, 2**32, 0),
        RegisterRecord(0, 0, 2**64),
        RegisterResult(0, 1),
        RegisterResult(2**32, 1),
        RegisterResult(1, -1),
        ZeroRun(1, 0, 0, 1),
        ZeroRun(0, -1, 0, 1),
        ZeroRun(0, 0, 0, 0),
        ZeroRun(0, 0, 2**64 - 1, 2),
        ZeroRun(0, 0, 1.5, 2),
        FinalAck(-1),
        FinalAck(0, "x" * 1025),
        FinalAck(0, "a\nb"),
        FinalAck(0, "\ud800"),
    ],
)
def test_bad_values_are_not_encoded(record):
    with pytest.raises(LocalProtocolError):
        record.encode()


@pytest.mark.parametrize(
    ("host", "offset", "length", "match"),
    [
        (0, 0, 0, "length is 0"),
        (2**64 - 1, 0, 2, "passes 2\\^64"),
        (0, 2**64 - 1, 2, "passes 2\\^64"),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, "passes 2\\^64"),
    ],
)
def test_ram_block_ranges_stay_in_the_address_space(host, offset, length, match):
    data = struct.pack(">QQQI4x", host, offset, length, 1)
    with pytest.raises(RemoteProtocolError, match=match):
        RamBlockRecord.decode(data)
    good = RamBlockRecord(2**64 - 2, 2**64 - 2, 2, 1)
    assert RamBlockRecord.decode(good.encode()) == good
    with pytest.raises(RemoteProtocolError, match=f"block 1: .*{match}"):
        decode_ram_blocks(good.encode() + data, None)


@given(st.lists(RAM_BLOCKS, min_size=1, max_size=20), st.data())
def test_block_list(records, data):
    payload = encode_ram_blocks(records)
    lengths = [record.length for record in records]
    assert decode_ram_blocks(payload, lengths) == decode_ram_blocks(payload, None) == records
    with pytest.raises(RemoteProtocolError, match="blocks, the source has"):
        decode_ram_blocks(payload, [*lengths, 4096])
    with pytest.raises(RemoteProtocolError, match="the source has"):
        decode_ram_blocks(payload, lengths[1:])
    wrong = data.draw(st.integers(0, len(records) - 1))
    lengths[wrong] += data.draw(st.sampled_from([-1, 1, 4096]))
    with pytest.raises(RemoteProtocolError, match=f"RAM block {wrong} has") as caught:
        decode_ram_blocks(payload, lengths)
    assert caught.value.remedy
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(RemoteProtocolError):
        decode_ram_blocks(payload[:cut], [record.length for record in records])


def test_block_list_limits():
    record = RamBlockRecord(0, 0, 4096, 0)
    most = encode_ram_blocks([record] * MAX_RAM_BLOCKS)
    assert len(decode_ram_blocks(most, [4096] * MAX_RAM_BLOCKS)) == 16383
    with pytest.raises(RemoteProtocolError, match="allowed are 1 to 16383"):
        decode_ram_blocks(most + record.encode(), None)
    for count in (0, MAX_RAM_BLOCKS + 1):
        with pytest.raises(LocalProtocolError, match="allowed are 1 to 16383"):
            encode_ram_blocks([record] * count)


@given(st.lists(REGISTERS, min_size=1, max_size=20), st.integers(1, 23))
def test_request_lists(records, cut):
    payload = b"".join(record.encode() for record in records)
    assert decode_register_requests(payload) == records
    for broken in (payload[:-cut], payload + bytes(cut), b""):
        with pytest.raises(RemoteProtocolError, match="multiples of 24"):
            decode_register_requests(broken)


@given(st.lists(RESULTS, min_size=1, max_size=20), st.integers(1, 15))
def test_result_lists(records, cut):
    payload = b"".join(record.encode() for record in records)
    assert decode_register_results(payload) == records
    for broken in (payload[:-cut], payload + bytes(cut), b""):
        with pytest.raises(RemoteProtocolError, match="multiples of 16"):
            decode_register_results(broken)
    with pytest.raises(RemoteProtocolError, match="rkey is 0"):
        decode_register_results(payload + bytes(16))


@pytest.mark.parametrize(
    ("record", "chunks"),
    [
        (RegisterRecord(0, 0, 0), range(1)),
        (RegisterRecord(CHUNK_SIZE - 1, 0, 0), range(1)),
        (RegisterRecord(CHUNK_SIZE, 0, 2), range(1, 4)),
        (RegisterRecord(0, 0, 3), range(4)),
        (RegisterRecord(0x10000000, 1, 1), range(2)),
        (RegisterRecord(0x10000000 + CHUNK_SIZE + 4095, 1, 0), range(1, 2)),
    ],
)
def test_register_within_the_blocks(record, chunks):
    assert check_register(record, BLOCKS) == chunks


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (RegisterRecord(0, 2, 0), "names block 2, there are 2"),
        (RegisterRecord(0, 2**32 - 1, 0), "names block 4294967295"),
        (
            RegisterRecord(4 * CHUNK_SIZE, 0, 0),
            "address 0x400000 for .*0x0 to 0x3fffff",
        ),
        (
            RegisterRecord(0xFFFFFFF, 1, 0),
            "0xfffffff for .*0x10000000 to 0x10100fff",
        ),
        (RegisterRecord(2**64 - 1, 1, 0), "has address"),
        (RegisterRecord(0, 0, 4), "chunks 0 to 4 of block 0, which has 4"),
        (RegisterRecord(CHUNK_SIZE, 0, 3), "chunks 1 to 4"),
        (RegisterRecord(CHUNK_SIZE, 0, 2**64 - 1), "which has 4"),
    ],
)
def test_register_outside_the_blocks(record, match):
    with pytest.raises(RemoteProtocolError, match=match):
        check_register(record, BLOCKS)


def test_unregister_names_chunks():
    assert check_unregister(RegisterRecord(3, 0, 0), BLOCKS) == range(3, 4)
    assert check_unregister(RegisterRecord(0, 1, 1), BLOCKS) == range(2)
    for record in (
        RegisterRecord(4, 0, 0),
        RegisterRecord(3, 0, 1),
        RegisterRecord(0, 2, 0),
        RegisterRecord(2**64 - 1, 0, 2**64 - 1),
    ):
        with pytest.raises(RemoteProtocolError, match="UNREGISTER_REQUEST"):
            check_unregister(record, BLOCKS)


@given(REGISTERS, st.lists(st.tuples(HALF, st.integers(1, 2**40)), max_size=4))
def test_register_answers_lie_in_the_block(record, blocks):
    try:
        chunks = check_register(record, blocks)
    except RemoteProtocolError:
        return
    offset, length = blocks[record.block_index]
    assert chunks.start * CHUNK_SIZE <= record.key - offset < (chunks.start + 1) * CHUNK_SIZE
    assert (chunks.stop - 1) * CHUNK_SIZE < length


@pytest.mark.parametrize(
    ("run", "start"),
    [
        (ZeroRun(0, 0, 0, 4 * CHUNK_SIZE), 0),
        (ZeroRun(0, 0, 4 * CHUNK_SIZE - 1, 1), 4 * CHUNK_SIZE - 1),
        (ZeroRun(0, 1, 0x10001000, CHUNK_SIZE), 4096),
    ],
)
def test_zero_run_within_the_blocks(run, start):
    assert check_zero_run(run, BLOCKS) == start


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (ZeroRun(0, 2, 0, 4096), "names block 2, there are 2"),
        (ZeroRun(1, 0, 0, 4096), "fill value 0x1, allowed is 0"),
        (ZeroRun(0, 0, 0, 0), "covers 0x0 bytes"),
        (ZeroRun(0, 0, 0, 4 * CHUNK_SIZE + 1), "covers 0x400001 bytes at 0x0 of block 0"),
        (ZeroRun(0, 0, 4 * CHUNK_SIZE, 1), "covers"),
        (ZeroRun(0, 1, 0, 4096), "at 0x0 of block 1, allowed are 0x10000000 to 0x10100fff"),
        (ZeroRun(0, 1, 2**64 - 1, 2**64 - 1), "covers"),
        (ZeroRun(0, 0, 4096, 2**64 - 4096), "covers"),
    ],
)
def test_zero_run_outside_the_blocks(run, match):
    with pytest.raises(RemoteProtocolError, match=match):
        check_zero_run(run, BLOCKS)


@given(ACKS)
def test_final_ack_round_trip(ack):
    assert FinalAck.decode(ack.encode()) == ack


@given(U32, st.text(max_size=2000))
def test_final_ack_fits_any_text(status, text):
    ack = FinalAck.fitted(status, text)
    assert FinalAck.decode(ack.encode()) == ack


def test_final_ack_refuses_and_cleans():
    for data in (b"", bytes(3), bytes(4) + b"x" * 1025):
        with pytest.raises(RemoteProtocolError, match="allowed are 4 to 1028"):
            FinalAck.decode(data)
    with pytest.raises(RemoteProtocolError, match="not UTF-8"):
        FinalAck.decode(bytes(4) + b"\xff")
    assert FinalAck.decode(b"\0\0\0\1a\x1b[2Jb\n") == FinalAck(1, "a [2Jb ")
