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
from rdma_mig.wire.stream import StreamParser

__all__ = ["TARGETS"]

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}

# Blocks as a guest has them, with gaps between and a last chunk that is not a whole one.
_EXTENTS = [(0, 0x2000000), (0x2000000, 0x40000), (0x4000000, 0x123000)]


def _target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


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
    assert PrivateData.decode(value.encode()) == value


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
    for decode in (
        RamBlockRecord.decode,
        RegisterRecord.decode,
        RegisterResult.decode,
        ZeroRun.decode,
        FinalAck.decode,
    ):
        with contextlib.suppress(RemoteProtocolError):
            decode(data)


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


@_target
def stream(data: bytes) -> None:
    """A migration stream: cut anywhere, it is the same stream."""
    assert _events(iter([data])) == _events(_cut(data))


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
