# SPDX-License-Identifier: Apache-2.0
"""What a real QEMU 7.2.22 sent and accepted on the control channel, in both roles.

``vectors/*.json`` hold the recorded facts: type, length, repeat and padding of each message, the
fields of its records, and payloads as far as they were recorded (long ones by beginning and end).
The bytes are put together here with struct, not with the code under test.
"""

import json
import struct
from pathlib import Path

import pytest

from rdma_mig.errors import RemoteProtocolError
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    RamBlockRecord,
    RegisterRecord,
    RegisterResult,
    ZeroRun,
    check_register,
    check_zero_run,
    decode_ram_blocks,
    decode_register_requests,
    decode_register_results,
    describe,
    encode_ram_blocks,
)
from rdma_mig.wire.handshake import FLAG_PIN_ALL, PrivateData
from rdma_mig.wire.stream import (
    Command,
    CommandType,
    Hook,
    RamEnd,
    RamPart,
    RamStart,
    SectionEnd,
    StreamBlock,
    StreamHead,
    StreamParser,
    encode_head,
    encode_hook,
    encode_ram_start,
)

VECTORS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "vectors").glob("*.json"))
}
ROLES = {role: [name for name in VECTORS if name.startswith(role)] for role in ("src", "dst")}

# The machine of the recordings: q35 with 32 MiB, blocks in stream order.
MACHINE = "pc-q35-7.2"
BLOCKS = [
    StreamBlock("pc.ram", 0x2000000),
    StreamBlock("/rom@etc/acpi/tables", 0x20000),
    StreamBlock("pc.bios", 0x40000),
    StreamBlock("pc.rom", 0x20000),
    StreamBlock("/rom@etc/table-loader", 0x1000),
    StreamBlock("/rom@etc/acpi/rsdp", 0x1000),
]
LENGTHS = [block.length for block in BLOCKS]
# The stand-in for the destination announced every block at offset 0.
AT_ZERO = [(0, length) for length in LENGTHS]

RECORDS = {
    "RAM_BLOCKS_RESULT": (">QQQII", ("host_address", "offset", "length", "rkey", "padding")),
    "COMPRESS": (">IIQQ", ("value", "block_index", "offset", "length")),
    "REGISTER_REQUEST": (">QIIQ", ("key", "block_index", "padding", "chunks")),
    "REGISTER_RESULT": (">IIQ", ("rkey", "padding", "host_address")),
}


def payload_of(message):
    """The payload: recorded, made of the recorded records, or with unknown bytes as 0xAA."""
    if "payload" in message:
        return bytes.fromhex(message["payload"])
    if "records" in message:
        layout, fields = RECORDS[message["type"]]
        return b"".join(
            struct.pack(layout, *(record[field] for field in fields))
            for record in message["records"]
        )
    begins = bytes.fromhex(message.get("begins", ""))
    ends = bytes.fromhex(message.get("ends", ""))
    return begins + b"\xaa" * (message["length"] - len(begins) - len(ends)) + ends


def bytes_of(message, payload):
    kind = ControlType[message["type"]]
    fields = (message["length"], kind, message["repeat"], message.get("padding", 0xDEADBEEF))
    return struct.pack(">IIII", *fields) + payload


def messages(name, sender, *kinds):
    return [
        message
        for message in VECTORS[name]["messages"]
        if message["from"] == sender and (not kinds or message["type"] in kinds)
    ]


def test_the_vectors_are_all_there():
    counts = {name: len(messages(name, "qemu")) for name in VECTORS}
    assert counts["src-pin"] == 14
    assert counts["src-dyn"] == 60
    assert counts["dst-pin"] == 15
    assert sum(counts.values()) == 471
    for name in ("src-postcopy-answered", "dst-dyn", "dst-minimal", "dst-error", "src-error"):
        assert counts[name]
    assert {"src-postcopy-unanswered", "dst-badversion", "dst-unknownflag"} <= set(VECTORS)


@pytest.mark.parametrize("name", VECTORS)
def test_every_message_decodes_and_encodes(name):
    for message in VECTORS[name]["messages"]:
        payload = payload_of(message)
        data = bytes_of(message, payload)
        assert len(data) == message.get("bytes", 16 + message["length"])
        # A stand-in's records were not recorded, so their contents are noise; lengths are not.
        decoded = ControlMessage.decode(data)
        assert decoded == ControlMessage(ControlType[message["type"]], payload, message["repeat"])
        assert describe(decoded).startswith(message["type"])
        again = decoded.encode()
        assert again[:12] + again[16:] == data[:12] + data[16:]
        for wrong in (data[:-1], data + b"\0"):
            with pytest.raises(RemoteProtocolError):
                ControlMessage.decode(wrong)


@pytest.mark.parametrize("name", VECTORS)
def test_private_data(name):
    vector = VECTORS[name]
    for text in vector["private_data"]:
        data = bytes.fromhex(text)
        value = PrivateData.decode(data + b"\xa5" * 48)
        assert value == PrivateData(1, FLAG_PIN_ALL if text.endswith("1") else 0)
        assert value.pin_all == ("-pin" in name or "-nopin" in name)
        assert value.encode() == data


def test_private_data_that_was_refused_or_cleaned():
    assert VECTORS["dst-badversion"]["accepted"] is False
    assert not VECTORS["dst-badversion"]["private_data"], "QEMU accepted nothing"
    for version in (0, 2):
        with pytest.raises(RemoteProtocolError, match=f"version is {version}"):
            PrivateData.decode(struct.pack(">II", version, 0))
    vector = VECTORS["dst-unknownflag"]
    request = PrivateData.decode(bytes.fromhex(vector["request"]))
    assert request == PrivateData(1, 0x80)
    answer = PrivateData(request.version, request.flags & FLAG_PIN_ALL)
    assert answer.encode().hex() == vector["private_data"][0]


@pytest.mark.parametrize("name", ROLES["dst"])
def test_block_lists_of_a_destination(name):
    results = messages(name, "qemu", "RAM_BLOCKS_RESULT")
    assert len(results) == (0 if name == "dst-badversion" else 1)
    for message in results:
        assert message["repeat"] == 1
        payload = payload_of(message)
        records = decode_ram_blocks(payload, LENGTHS)
        assert [record.offset for record in records] == [
            record["offset"] for record in message["records"]
        ]
        assert all(bool(record.rkey) == (name == "dst-pin") for record in records)
        assert encode_ram_blocks(records) == payload
        assert records[1] == RamBlockRecord(
            **{key: value for key, value in message["records"][1].items() if key != "padding"}
        )


@pytest.mark.parametrize("name", ROLES["dst"])
def test_register_results_of_a_destination(name):
    for message in messages(name, "qemu", "REGISTER_RESULT"):
        payload = payload_of(message)
        (result,) = decode_register_results(payload)
        (record,) = message["records"]
        assert result == RegisterResult(record["rkey"], record["host_address"])
        assert result.encode() == payload


@pytest.mark.parametrize("name", ROLES["src"])
def test_requests_of_a_source_lie_in_the_blocks(name):
    covered = set()
    for message in messages(name, "qemu", "COMPRESS", "REGISTER_REQUEST"):
        if "records" not in message:
            continue
        payload = payload_of(message)
        (record,) = message["records"]
        if message["type"] == "COMPRESS":
            run = ZeroRun.decode(payload)
            start = check_zero_run(run, AT_ZERO)
            assert run.encode() == payload
            assert start == record["offset"]
            covered.update(
                (run.block_index, page) for page in range(start, start + run.length, 4096)
            )
        else:
            (request,) = decode_register_requests(payload)
            assert check_register(request, AT_ZERO) == range(1)
            assert RegisterRecord(record["key"], record["block_index"], 0) == request
            assert request.encode() == payload
    if name == "src-dyn":
        assert covered >= {(0, page) for page in range(0x100000, 0x1000000, 4096)}


def stream_of(name):
    """QEMU's stream messages; what was cut is made by our encoders and must fit what was not."""
    start = encode_ram_start(2, BLOCKS) + encode_hook()
    whole = [encode_head(MACHINE) + start, start]
    pieces = []
    for message in messages(name, "qemu", "QEMU_FILE"):
        assert message["qp"] == 0
        piece = payload_of(message)
        if "begins" in message and message["length"] < 32768:
            begins, ends = (bytes.fromhex(message[key]) for key in ("begins", "ends"))
            fitting = [
                made
                for made in whole
                if made.startswith(begins) and made.endswith(ends) and len(made) == len(piece)
            ]
            # Device state is not known; all that comes before it is.
            assert fitting or message["length"] == 10475
            piece = fitting[0] if fitting else piece
        pieces.append(piece)
    return pieces


def events_of(pieces):
    parser = StreamParser()
    events = []
    state = b""
    for piece in pieces:
        parser.feed(piece)
        while (event := parser.next_event()) is not None:
            events.append(event)
        if parser.in_device_state:
            state += parser.remainder()
    return events, state


def part(kind, header):
    return [header(2), Hook(), SectionEnd(kind, True)]


HEAD = StreamHead(encode_head(MACHINE), MACHINE, ())
RAM = [RamStart(2, 0, 4, sum(LENGTHS), tuple(BLOCKS)), Hook(), SectionEnd("start", True)]
POSTCOPY = [
    Command(CommandType.OPEN_RETURN_PATH, b""),
    Command(CommandType.PING, b"\0\0\0\1"),
    Command(CommandType.POSTCOPY_ADVISE, struct.pack(">QQ", 4096, 4096)),
]


@pytest.mark.parametrize(
    ("name", "commands", "parts"),
    [("src-pin", [], 1), ("src-dyn", [], 3), ("src-postcopy-answered", POSTCOPY, 3)],
)
def test_stream_of_a_source(name, commands, parts):
    pieces = stream_of(name)
    events, state = events_of(pieces)
    rounds = part("part", RamPart) * parts
    assert events == [HEAD, *commands, *RAM, *rounds, *part("end", RamEnd)]
    assert state[:11] == bytes.fromhex("0400000000") + b"\5timer"
    joined = b"".join(pieces)
    assert joined.endswith(state)
    # 32768 + 32768 + 10475 bytes, less the footer that they begin with.
    assert len(state) == 76011 - 5
    assert events_of([joined[at : at + 7] for at in range(0, len(joined), 7)]) == (events, state)


@pytest.mark.parametrize("name", ["src-error", "src-cancel-1", "src-disconnect"])
def test_stream_of_a_source_that_failed(name):
    events, state = events_of(stream_of(name))
    assert events[:3] == [HEAD, *RAM[:2]]
    assert not any(isinstance(event, RamEnd) for event in events)
    assert state == b""


def test_return_path_frames_are_ordinary_messages():
    frames = [
        message["payload"]
        for message in messages("dst-returnpath-ready", "qemu", "QEMU_FILE")
        if message["qp"] == 1
    ]
    assert frames == ["0002000400000001", "0001000400000000"]
