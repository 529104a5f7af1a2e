# SPDX-License-Identifier: Apache-2.0
"""The destination's engine for any guest: a migration stream into its RAM and devices."""

from __future__ import annotations

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import DestinationTransport
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
from rdma_mig.migration.take_over import read_events, require_pages, take_over
from rdma_mig.wire.stream import (
    Event,
    Hook,
    RamEnd,
    RamPart,
    RamStart,
    SectionEnd,
    StreamHead,
    StreamParser,
)

__all__ = ["LiveDestination"]

_AT_SOURCE = "the guest is still the source's"


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
        for event in read_events(file, self._parser, transport):
            with self._parser.locating():
                self._handle(event, migration, file, transport)
        take_over(migration, file, transport, self._parser, self.guest.load_device_state)
        self.guest.resume()

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
            case SectionEnd(kind="end") if file.hooks is None:
                assert self._ram is not None
                require_pages(migration.state.page_reader, self._ram, transport.peer)
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
