# SPDX-License-Identifier: Apache-2.0
"""The destination's engine for any guest: a migration stream into its RAM and devices."""

from __future__ import annotations

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import DestinationTransport
from rdma_mig.errors import MigrationError, PeerGone, RemoteProtocolError
from rdma_mig.memory.page_stream import PageReader
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.events import Progress
from rdma_mig.migration.interfaces import Guest
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_BLOCK_REG,
    RAM_CONTROL_HOOK,
    ram_control_load_hook,
)
from rdma_mig.migration.state import Migration
from rdma_mig.migration.status import MigrationState, MigrationStatus
from rdma_mig.wire.control import FinalAck
from rdma_mig.wire.description import DeviceStateScanner
from rdma_mig.wire.device_state import DeviceState
from rdma_mig.wire.stream import (
    Command,
    CommandType,
    Event,
    Hook,
    RamEnd,
    RamPart,
    RamStart,
    SectionEnd,
    StreamHead,
    StreamParser,
)

__all__ = ["DEVICE_STATE_MAX", "LiveDestination"]

DEVICE_STATE_MAX = 1 << 30
"""Bytes of device state that are taken at most; they are kept in memory until all have come."""

_AT_SOURCE = "the guest is still the source's"
_NOT_KNOWN = (
    "whether the source has heard that the guest is here is not known, so it rests here and there: "
    "resume one of them"
)
_DISCONNECT_SECONDS = 10.0


class LiveDestination:
    """Loads one migration into a guest, and runs it; ``process`` is its engine function.

    Args:
        guest: loaded into; closed by its owner, after this.
    """

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._ram: GuestRam | None = None
        self._parser = StreamParser()
        self._head: StreamHead | None = None
        self._footers = True
        self._state: MigrationState | None = None

    def process(
        self, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> None:
        """Load the stream from ``file``, tell the source, and resume the guest.

        Raises:
            MigrationError: it failed; its ``owner`` says where the guest is.
        """
        self._state = migration.state
        if file.hooks is None:
            self._parser = StreamParser(page_sink=self._pages)
        migration.state.step = "receiving the guest's description"
        migration.state.owner = _AT_SOURCE
        while not self._parser.in_device_state:
            event = self._parser.next_event()
            if event is not None:
                self._handle(event, migration, file, transport)
                continue
            data = file.get()
            if not data:
                raise PeerGone(
                    f"{transport.peer} ended the stream; awaited was {self._parser.awaiting}"
                )
            self._parser.feed(data)
        migration.state.step = "receiving device state"
        transport.withdraw_keys()
        if not transport.final_ack and not transport.has_return_path:
            transport.next_ready_commits()
            migration.state.owner = transport.handed_over
        state = self._device_state(migration, file, transport)
        try:
            self.guest.load_device_state(state)
        except MigrationError as error:
            if transport.final_ack:
                transport.acknowledge(FinalAck.fitted(1, error.message))
            raise
        self._take_over(migration, transport)
        migration.state.owner = "the guest runs here"
        self.guest.resume()

    def _take_over(self, migration: Migration, transport: DestinationTransport) -> None:
        """Tell the source that the guest is here. From the first word on it may believe that."""
        migration.state.owner = _NOT_KNOWN
        if transport.final_ack:
            transport.acknowledge(FinalAck(0))
        if transport.has_return_path:
            transport.shut(_DISCONNECT_SECONDS)
        else:
            transport.wait_disconnected(_DISCONNECT_SECONDS)

    def _pages(self, _start: RamStart) -> PageReader:
        assert self._ram is not None
        assert self._state is not None
        self._state.page_reader = PageReader(self._ram)
        return self._state.page_reader

    def _handle(
        self, event: Event, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> None:
        match event:
            case StreamHead():
                self._head = event
            case Command():
                if event.command is CommandType.OPEN_RETURN_PATH:
                    transport.open_return_path()
                elif event.command is CommandType.PING and transport.has_return_path:
                    transport.pong(int.from_bytes(event.data, "big"))
            case RamStart():
                self._start_ram(event, migration, file, transport)
            case Hook():
                migration.state.step = f"receiving RAM, round {migration.state.rounds + 1}"
                ram_control_load_hook(file, RAM_CONTROL_HOOK)
            case RamPart() | RamEnd():
                migration.note_round(last=isinstance(event, RamEnd))
                migration.emit(Progress("round", migration.state.rounds, 0))
                if isinstance(event, RamEnd):
                    migration.advance(MigrationStatus.DEVICE)
            case SectionEnd():
                self._footers = event.has_footer

    def _start_ram(
        self, start: RamStart, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> None:
        assert self._head is not None
        self._ram = self.guest.prepare(self._head, start)
        migration.state.ram_total = self._ram.total
        for guest in self._ram:
            ram_control_load_hook(file, RAM_CONTROL_BLOCK_REG, guest.block.idstr)
        transport.attach(self._ram)
        migration.emit(Progress("setup", 0, self._ram.total))

    def _device_state(
        self, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> DeviceState:
        scanner = DeviceStateScanner()
        kept = bytearray()
        data = self._parser.remainder()
        while True:
            kept += data
            if len(kept) > DEVICE_STATE_MAX:
                raise RemoteProtocolError(
                    f"the device state has more than {DEVICE_STATE_MAX >> 20} MiB"
                )
            scanner.feed(data)
            if scanner.complete:
                break
            migration.emit(Progress("device-state", scanner.total, 0))
            data = file.get()
            if not data:
                if scanner.closes_without_description:
                    break
                raise PeerGone(f"{transport.peer} ended the stream within the device state")
        return DeviceState(bytes(kept), scanner.eof_offset, self._footers)
