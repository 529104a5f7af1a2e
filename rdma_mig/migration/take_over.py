# SPDX-License-Identifier: Apache-2.0
"""How a destination takes over: the stream up to its devices, and then the machine itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import DestinationTransport
from rdma_mig.errors import MigrationError, RemoteProtocolError, StreamCut
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.memory.page_stream import PageReader
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.events import Progress
from rdma_mig.migration.state import Migration
from rdma_mig.wire.control import FinalAck
from rdma_mig.wire.description import DeviceStateScanner
from rdma_mig.wire.device_state import DeviceState
from rdma_mig.wire.stream import Command, CommandType, Event, StreamParser

__all__ = ["DEVICE_STATE_MAX", "no_description", "read_events", "require_pages", "take_over"]

DEVICE_STATE_MAX = 1 << 30
"""Bytes of device state that are taken at most; they are kept in memory until all have come."""

_NOT_KNOWN = (
    "whether the source has heard that the guest is here is not known, so it rests here and there: "
    "resume one of them"
)
_DISCONNECT_SECONDS = 10.0


def read_events(
    file: QEMUFile, parser: StreamParser, transport: DestinationTransport
) -> Iterator[Event]:
    """Read a stream up to its device state, and do for the return path what it asks for.

    Args:
        file: the stream, from its first byte.
        parser: gets its bytes.
        transport: what it runs over.

    Yields:
        what the parser finds but for commands. A `RemoteProtocolError` of who handles it says
        where in the stream that was, if raised within ``parser.locating()``.

    Raises:
        RemoteProtocolError: the stream is broken, or ends.
        MigrationError: it could not be read.
    """
    while not parser.in_device_state:
        event = parser.next_event()
        match event:
            case None:
                data = file.get()
                if not data:
                    raise StreamCut(transport.peer, file.position, parser.awaiting)
                parser.feed(data)
            case Command(CommandType.OPEN_RETURN_PATH):
                transport.open_return_path()
            case Command(CommandType.PING, value):
                if transport.has_return_path:
                    transport.pong(int.from_bytes(value, "big"))
            case Command():
                pass
            case _:
                yield event


def require_pages(pages: PageReader | None, ram: GuestRam, peer: str) -> None:
    """Refuse RAM of which a block never came in the stream.

    A source says of each page what is in it, unless it knows that its guest does not use it: there
    is no block of which it says nothing.

    Args:
        pages: has loaded what came; None if nothing did.
        ram: what was to come.
        peer: the source, for the message.

    Raises:
        RemoteProtocolError: with the first such block.
    """
    came = 0 if pages is None else pages.counters.normal + pages.counters.duplicate
    missing = [guest.block.idstr for guest in ram] if pages is None else pages.missing
    if missing:
        raise RemoteProtocolError(
            f"{peer} sent {came} of {ram.total // TARGET_PAGE_SIZE} pages of RAM, and none of "
            f"block {missing[0]!r}"
        )


def no_description(peer: str, at: int) -> StreamCut:
    """Return the error for a stream that ends where its description was to come.

    Args:
        peer: whose stream.
        at: bytes of it that came.
    """
    return StreamCut(
        peer,
        at,
        "the description behind the device state",
        remedy="if it has all come, switch suppress-vmdesc of the source's machine off",
    )


def take_over(
    migration: Migration,
    file: QEMUFile,
    transport: DestinationTransport,
    parser: StreamParser,
    load: Callable[[DeviceState], None],
) -> None:
    """Take the machine, all of its RAM having come: the counterpart of `hand_over`.

    Args:
        migration: whose step and owner follow.
        file: the stream, of which `read_events` has read up to the device state.
        transport: what it runs over.
        parser: has found the end of RAM.
        load: takes everything that is not RAM; raises a MigrationError if it cannot.

    Raises:
        MigrationError: it failed; the owner says where the machine is.
    """
    migration.state.step = "receiving device state"
    transport.withdraw_keys()
    if not transport.final_ack and not transport.has_return_path:
        transport.next_ready_commits()
        migration.state.owner = transport.handed_over
    state = _read_device_state(migration, file, transport, parser)
    try:
        with parser.locating():
            load(state)
    except MigrationError as error:
        if transport.final_ack:
            transport.acknowledge(FinalAck.fitted(1, error.message))
        raise
    # From the first word on the source may believe that the machine is here.
    migration.state.owner = _NOT_KNOWN
    if transport.final_ack:
        transport.acknowledge(FinalAck(0))
    if transport.has_return_path:
        transport.shut(_DISCONNECT_SECONDS)
    else:
        transport.wait_disconnected(_DISCONNECT_SECONDS)
    migration.state.owner = "the guest runs here"


def _read_device_state(
    migration: Migration, file: QEMUFile, transport: DestinationTransport, parser: StreamParser
) -> DeviceState:
    scanner = DeviceStateScanner()
    kept = bytearray()
    data = parser.remainder()
    while True:
        kept += data
        if len(kept) > DEVICE_STATE_MAX:
            raise RemoteProtocolError(
                f"the device state has more than {DEVICE_STATE_MAX >> 20} MiB "
                f"(byte {file.position} of the stream)",
                at=file.position,
            )
        scanner.feed(data)
        if scanner.complete:
            break
        migration.emit(Progress("device-state", scanner.total, 0))
        data = file.get()
        if not data:
            if scanner.closes_without_description:
                if transport.end_is_sure:
                    break
                raise no_description(transport.peer, file.position)
            raise StreamCut(transport.peer, file.position, "the rest of the device state")
    return DeviceState(bytes(kept), scanner.eof_offset, parser.footers)
