# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: a function for each decoder of bytes that come from outside, and what must hold.

A target takes any bytes. The only exceptions that may leave a decoder are those that it documents;
what it accepts must survive encoding and decoding again; where a stream was cut must make no
difference. Anything else is raised as it comes, or as an AssertionError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError, SnapshotError, UsageError
from rdma_mig.snapshot.manifest import Manifest
from rdma_mig.wire.address import RdmaAddress
from rdma_mig.wire.control import (
    ControlHeader,
    ControlMessage,
    ControlType,
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
    describe,
    encode_ram_blocks,
)
from rdma_mig.wire.description import DESCRIPTION_MAX, DeviceStateScanner, parse_description
from rdma_mig.wire.handshake import Extension, PrivateData
from rdma_mig.wire.return_path import ReturnParser
from rdma_mig.wire.stream import (
    Command,
    Hook,
    RamEnd,
    RamPart,
    RamStart,
    SectionEnd,
    StreamHead,
    StreamParser,
    encode_command,
    encode_eos,
    encode_footer,
    encode_head,
    encode_hook,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)

__all__ = ["TARGETS"]

Target = Callable[[bytes], None]
_Record = RamBlockRecord | RegisterRecord | RegisterResult | ZeroRun | FinalAck
TARGETS: dict[str, Target] = {}

# Which bytes of a record mean nothing.
_PADDING: dict[type[_Record], slice] = {
    RamBlockRecord: slice(28, 32),
    RegisterRecord: slice(12, 16),
    RegisterResult: slice(4, 8),
    ZeroRun: slice(0, 0),
    FinalAck: slice(0, 0),
}

# Blocks as a guest has them, with gaps between and a last chunk that is not a whole one.
_EXTENTS = [(0, 0x2000000), (0x2000000, 0x40000), (0x4000000, 0x123000)]


def _target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


def _without(data: bytes, padding: slice) -> bytes:
    return data[: padding.start] + data[padding.stop :]


def _cut(data: bytes) -> Iterator[bytes]:
    """The bytes in pieces whose sizes come from the bytes themselves."""
    at = 0
    while at < len(data):
        size = 1 + (data[at] & 15) ** 2
        yield data[at : at + size]
        at += size


@_target
def handshake(data: bytes) -> None:
    """Private data of a request or reply, and the extension block in it."""
    Extension.decode(data)
    try:
        value = PrivateData.decode(data)
    except RemoteProtocolError:
        return
    again = value.encode()
    assert PrivateData.decode(again) == value
    if value.extension is not None and not any(data[28:52]) and data[14:16] == b"\0\0":
        # All but the reserved bytes, which a later version may use, is said in one way only.
        assert again == data[:56]


@_target
def control(data: bytes) -> None:
    """A control message, its header alone, and the records in it."""
    with contextlib.suppress(RemoteProtocolError):
        ControlHeader.decode(data[:16])
    try:
        message = ControlMessage.decode(data)
    except RemoteProtocolError:
        return
    describe(message)
    try:
        again = message.encode()
    except LocalProtocolError:
        pass  # a peer may say what we would not
    else:
        assert ControlMessage.decode(again) == message
        # Four bytes of the header are padding, which a peer may fill with anything.
        assert again[:12] + again[16:] == data[:12] + data[16:]
    with contextlib.suppress(RemoteProtocolError):
        _records(message)


def _records(message: ControlMessage) -> None:
    payload = message.payload
    match message.type:
        case ControlType.RAM_BLOCKS_RESULT:
            blocks = decode_ram_blocks(payload, [length for _offset, length in _EXTENTS])
            assert (
                decode_ram_blocks(
                    encode_ram_blocks(blocks), [length for _offset, length in _EXTENTS]
                )
                == blocks
            )
        case ControlType.REGISTER_REQUEST | ControlType.UNREGISTER_REQUEST:
            check = (
                check_register if message.type is ControlType.REGISTER_REQUEST else check_unregister
            )
            for request in decode_register_requests(payload):
                assert RegisterRecord.decode(request.encode()) == request
                chunks = check(request, _EXTENTS)
                length = _EXTENTS[request.block_index][1]
                assert 0 <= chunks.start < chunks.stop <= -(-length // (1 << 20))
        case ControlType.REGISTER_RESULT:
            for result in decode_register_results(payload):
                assert RegisterResult.decode(result.encode()) == result
        case ControlType.COMPRESS:
            run = ZeroRun.decode(payload)
            start = check_zero_run(run, _EXTENTS)
            assert 0 <= start < start + run.length <= _EXTENTS[run.block_index][1]
            assert ZeroRun.decode(run.encode()) == run
        case ControlType.FINAL_ACK:
            ack = FinalAck.decode(payload)
            assert FinalAck.decode(ack.encode()) == ack


@_target
def records(data: bytes) -> None:
    """Records without a message around them: every decoder sees every input."""
    for kind, padding in _PADDING.items():
        try:
            record = kind.decode(data)
        except RemoteProtocolError:
            continue
        try:
            again = record.encode()
        except LocalProtocolError:
            continue  # a peer may say what we would not
        assert kind.decode(again) == record
        if not isinstance(record, FinalAck) or record.message.encode() == data[4:]:
            # Unprintable characters of a message have become spaces.
            assert _without(again, padding) == _without(data, padding)


def _events(pieces: Iterator[bytes]) -> tuple[list[object], str, bytes]:
    """What a parser makes of a stream: events, the error that ended it, the device state."""
    parser = StreamParser()
    events: list[object] = []
    state = b""
    try:
        for piece in pieces:
            parser.feed(piece)
            while (event := parser.next_event()) is not None:
                events.append(event)
            assert isinstance(parser.awaiting, str)
            if parser.in_device_state:
                state += parser.remainder()
    except RemoteProtocolError as error:
        return events, str(error), b""
    return events, "", state


def _said(events: list[object]) -> bytes:
    """The bytes of the events, by our encoders."""
    said = b""
    section_id = 0
    for event in events:
        match event:
            case StreamHead():
                assert event.raw == encode_head(event.machine, event.subsections)
                said += event.raw
            case Command():
                said += encode_command(event.command, event.data)
            case RamStart():
                section_id = event.section_id
                said += encode_ram_start(section_id, event.blocks)
            case Hook():
                said += encode_hook()
            case RamPart():
                said += encode_section_part(section_id)
            case RamEnd():
                said += encode_section_end(section_id)
            case SectionEnd():
                said += encode_eos() + (encode_footer(section_id) if event.has_footer else b"")
            case _:
                raise AssertionError(f"an event of no known kind: {event}")
    return said


@_target
def stream(data: bytes) -> None:
    """A migration stream: cut anywhere, it is the same stream, and it is said in one way only."""
    events, error, state = _events(iter([data]))
    assert (events, error, state) == _events(_cut(data))
    assert data.startswith(_said(events) + state)


@_target
def device_state(data: bytes) -> None:
    """The end of the device state, found in whatever pieces it comes."""
    whole, pieces = DeviceStateScanner(), DeviceStateScanner()
    whole.feed(data)
    for piece in _cut(data):
        pieces.feed(piece)
        assert len(pieces._kept) <= DESCRIPTION_MAX + 11
    for scanner in (whole, pieces):
        assert scanner.total == len(data)
    assert whole.complete == pieces.complete
    assert whole.closes_without_description == pieces.closes_without_description
    if whole.complete:
        assert whole.description == pieces.description
        assert whole.eof_offset == pieces.eof_offset
        assert data[whole.eof_offset - 1] == 0
        assert data.endswith(whole.description)


@_target
def description(data: bytes) -> None:
    """The description of the devices: JSON of a stranger."""
    with contextlib.suppress(RemoteProtocolError):
        parsed = parse_description(data)
        assert len(parsed.devices) <= len(data)


@_target
def return_path(data: bytes) -> None:
    """Frames of a return path."""

    def frames(pieces: Iterator[bytes]) -> tuple[list[object], bool]:
        parser = ReturnParser()
        found: list[object] = []
        try:
            for piece in pieces:
                parser.feed(piece)
                while (message := parser.next_message()) is not None:
                    found.append(message)
        except RemoteProtocolError:
            return found, True
        return found, False

    found, failed = frames(iter([data]))
    assert (found, failed) == frames(_cut(data))
    sent = b"".join(message.encode() for message in found)  # type: ignore[attr-defined]
    assert data.startswith(sent)


@_target
def address(data: bytes) -> None:
    """A URI on the command line."""
    text = data.decode("utf-8", "surrogateescape")
    for listening in (True, False):
        with contextlib.suppress(UsageError):
            parsed = RdmaAddress.parse(text, listening=listening)
            assert RdmaAddress.parse(str(parsed), listening=listening) == parsed


@_target
def manifest(data: bytes) -> None:
    """The manifest of a snapshot, which anybody may have written."""
    try:
        parsed = Manifest.decode(data, "manifest.json")
    except SnapshotError:
        return
    assert Manifest.decode(parsed.encode(), "manifest.json") == parsed
