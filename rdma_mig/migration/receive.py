# SPDX-License-Identifier: Apache-2.0
"""The destination's engine: a migration stream into a snapshot directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import DestinationTransport
from rdma_mig.errors import (
    HostError,
    MigrationError,
    MigrationTimeout,
    PeerGone,
    RemoteProtocolError,
    StreamCut,
)
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE, RamBlock
from rdma_mig.memory.page_stream import PageReader
from rdma_mig.memory.ram import GuestRam, require_memory
from rdma_mig.migration.events import Completed, Progress, Warned
from rdma_mig.migration.keep import SnapshotKeeper, facts_of
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_BLOCK_REG,
    RAM_CONTROL_HOOK,
    ram_control_load_hook,
)
from rdma_mig.migration.shared_blocks import SharedBlocks, choose_shared
from rdma_mig.migration.state import Migration, MigrationStatus
from rdma_mig.migration.take_over import no_description, require_pages
from rdma_mig.snapshot import SnapshotWriter, StreamFacts
from rdma_mig.wire.control import FinalAck
from rdma_mig.wire.description import DeviceStateScanner
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

__all__ = ["SnapshotDestination"]

_NOT_KNOWN = (
    "whether the source let go of its virtual machine is not known: if it is in postmigrate "
    "(`info status` there), it is kept here, and else it is the source's"
)
_BEFORE_RAM = (
    "see what the source says (`info migrate`); a QEMU up to 7.2 fails here when its capability "
    "return-path is on and postcopy-ram is off: switch it off"
)
_DISCONNECT_SECONDS = 10.0
# A source with a return path, whose stream seems to be over, may stay silent for so long: it sends
# all device state at one go, its guest being stopped.
_DESCRIPTION_SECONDS = 30.0


class SnapshotDestination:
    """Loads one migration and keeps it as a snapshot; ``process`` is its engine function.

    Args:
        path: the snapshot directory; must not exist.
        shared_blocks: names of the RAM blocks that a source with x-ignore-shared keeps to itself,
            `NO_SHARED_BLOCKS` for none; None to guess.
        max_ram: most bytes of RAM that a guest may have, within what this host has available.
        huge_pages: receive RAM into huge pages that were set aside, as `GuestRam` has it.
        sync_before: put RAM on disk before the commit point, at the cost of the guest's downtime.
        custodian: start a process at once that finishes the snapshot should this one be killed
            when RAM is here, in memory only, and the source may have let go. What it says goes to
            standard error. Useless with ``sync_before``.

    Raises:
        SnapshotError: it cannot be written there.
    """

    def __init__(
        self,
        path: str | Path,
        shared_blocks: Sequence[str] | None = None,
        *,
        max_ram: int | None = None,
        huge_pages: bool = False,
        sync_before: bool = False,
        custodian: bool = False,
    ) -> None:
        self.keeper = SnapshotKeeper(path, custodian=custodian and not sync_before)
        self._max_ram = max_ram
        self._huge_pages = huge_pages
        self._sync_before = sync_before
        self._named_shared = shared_blocks
        self._shared = SharedBlocks()
        self._parser = StreamParser()
        self._pages: PageReader | None = None
        self._scanner = DeviceStateScanner()
        self._head: StreamHead | None = None
        self._start: RamStart | None = None
        self._ram: GuestRam | None = None
        self._footers = True
        self._began = 0.0
        self._streamed = 0.0
        self._ram_is_whole = False

    @property
    def writer(self) -> SnapshotWriter:
        """Of the snapshot."""
        return self.keeper.writer

    def close(self) -> None:
        """Free the guest's memory; remove what was written unless it is to be kept."""
        if self._ram is not None:
            self._ram.close()
        self.keeper.close()

    def process(
        self, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> None:
        """Load the stream from ``file`` and write the snapshot.

        Raises:
            MigrationError: it failed; its ``owner`` says who owns the virtual machine.
        """
        migration.state.owner = transport.at_source
        migration.state.step = "receiving the machine's description"
        if file.hooks is None:
            self._parser = StreamParser(self._page_reader)
        self._began = time.monotonic()
        try:
            if not self._lets_go(transport):
                self.keeper.dismiss_custodian()
            self._load_ram(migration, file, transport)
            self._load_device_state(migration, file, transport)
            # Room that is made later is not part of it.
            self._streamed = time.monotonic() - self._began - self.keeper.reserving_seconds
            self._keep(migration, transport)
        except MigrationError as error:
            if not error.owner:
                error.owner = migration.state.owner
            if isinstance(error, PeerGone) and not transport.went_on and self._shared.asked:
                # How a source ends that is offered other blocks than those it would send.
                error.remedy = self._shared.remedy
            if self.writer.keep_on_failure and self.writer.kept_at is None:
                kept = self.keeper.rescue(migration, self._ram, self._facts())
                error.remedy = "; ".join(part for part in (kept, error.remedy) if part)
            raise

    # ---- RAM ----

    def _load_ram(
        self, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> None:
        while not self._parser.in_device_state:
            event = self._parser.next_event()
            if event is not None:
                with self._parser.locating():
                    self._handle(event, migration, file, transport)
                continue
            try:
                data = file.get()
            except PeerGone as error:
                if self._start is None and not error.remedy:
                    error.remedy = _BEFORE_RAM
                raise
            if not data:
                raise StreamCut(transport.peer, file.position, self._parser.awaiting)
            self._parser.feed(data)

    def _handle(
        self, event: Event, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> None:
        match event:
            case StreamHead():
                self._head = event
                if event.machine is None:
                    raise RemoteProtocolError(
                        "the stream does not say which machine it belongs to",
                        remedy="start the source without migration.send-configuration=off",
                    )
                self.writer.write_config(event.raw)
            case Command():
                self._obey(event, migration, transport)
            case RamStart():
                self._start_ram(event, migration, file, transport)
            case Hook():
                ram_control_load_hook(file, RAM_CONTROL_HOOK)
                migration.state.step = f"receiving RAM, round {migration.state.rounds + 1}"
                if migration.state.status is MigrationStatus.DEVICE:
                    self._commit_point(migration, transport)
            case RamPart():
                self.keeper.wait_custodian(migration)
                migration.note_round(last=False)
                migration.emit(Progress("round", migration.state.rounds, 0))
            case RamEnd():
                self.keeper.wait_custodian(migration)
                migration.note_round(last=True)
                migration.advance(MigrationStatus.DEVICE)
                migration.state.step = "receiving the last RAM"
                migration.emit(Progress("round", migration.state.rounds, 0))
            case SectionEnd():
                self._footers = event.has_footer
                if event.kind == "end" and file.hooks is None:
                    self._require_pages(transport)
                    self._commit_point(migration, transport)
                if event.kind == "end" and not self._ram_is_whole:
                    raise RemoteProtocolError(
                        f"{transport.peer} ended the RAM section without a last RDMA phase"
                    )

    def _obey(
        self, command: Command, migration: Migration, transport: DestinationTransport
    ) -> None:
        match command.command:
            case CommandType.OPEN_RETURN_PATH:
                if not transport.open_return_path():
                    # QEMU 7.2 with return-path and without postcopy-ram, which then fails there.
                    migration.emit(
                        Warned(
                            "the source speaks of a return path and opened none; QEMU up to 7.2 "
                            "needs return-path off, or postcopy-ram on as well"
                        )
                    )
            case CommandType.PING if transport.has_return_path:
                transport.pong(int.from_bytes(command.data, "big"))
            case CommandType.POSTCOPY_ADVISE if command.data:
                migration.emit(Warned("do not start postcopy at the source: it would fail there"))

    def _start_ram(
        self, start: RamStart, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> None:
        assert self._head is not None
        self._shared = choose_shared(self._head, start.blocks, self._named_shared)
        if self._shared.warning:
            migration.emit(Warned(self._shared.warning))
        kept = [block for block in start.blocks if block.idstr not in self._shared.names]
        total = sum(block.length for block in kept)
        if self._max_ram is not None and total > self._max_ram:
            raise HostError(
                f"the source announces {total >> 20} MiB of RAM and --max-ram allows "
                f"{self._max_ram >> 20} MiB",
                remedy="allow more, if this is the machine that was awaited",
            )
        require_memory((block.length for block in kept), huge_pages=self._huge_pages)
        self._start = start
        self._ram = GuestRam(
            [
                RamBlock(block.idstr, block.length, block.page_size, block.guest_address)
                for block in kept
            ],
            huge_pages=self._huge_pages,
        )
        for guest in self._ram:
            ram_control_load_hook(file, RAM_CONTROL_BLOCK_REG, guest.block.idstr)
        transport.attach(self._ram)
        migration.state.step = "agreeing on the RAM blocks"
        migration.emit(Progress("setup", 0, total))

    def _page_reader(self, _start: RamStart) -> PageReader:
        assert self._ram is not None
        self._pages = PageReader(self._ram)
        return self._pages

    def _require_pages(self, transport: DestinationTransport) -> None:
        """Refuse RAM of which a part never came; a source says of each page what is in it.

        Where it need not, since it may know of free pages, only a block that it keeps to itself
        and that was taken as sent is to be noticed.
        """
        assert self._ram is not None
        came = 0
        if self._pages is not None:
            came = self._pages.counters.normal + self._pages.counters.duplicate
        if self._shared.asked and came * TARGET_PAGE_SIZE < self._ram.total:
            raise RemoteProtocolError(
                f"{transport.peer} sent {came} of {self._ram.total // TARGET_PAGE_SIZE} pages of "
                "RAM",
                remedy=self._shared.remedy,
            )
        require_pages(self._pages, self._ram, transport.peer)

    def _commit_point(self, migration: Migration, transport: DestinationTransport) -> None:
        """Be sure of RAM before the source may go on to what makes it let go of the machine.

        The READY for the first message after this phase is what lets a QEMU source complete. Up
        to here a failure leaves the guest running there; so everything that can fail is done
        first: nobody can change RAM any more, and the disk has room for all of it.

        A source with a return path waits for our word instead, and until then goes on with its
        guest if anything fails here. What can fail comes early all the same. Where the source
        awaits the final acknowledgement it keeps its machine until then, and room is made after it.
        """
        assert self._ram is not None
        migration.state.step = "making sure of disk space"
        transport.withdraw_keys()
        if self._sync_before or transport.has_return_path or not transport.final_ack:
            self.keeper.reserve(migration, self._ram, self._facts() if self._sync_before else None)
        if self._lets_go(transport):
            self.keeper.entrust(migration, self._facts())
        self._ram_is_whole = True
        migration.state.step = "receiving device state"
        if not transport.has_return_path:
            if not transport.final_ack:
                transport.next_ready_commits()
            self.writer.keep_on_failure = transport.source_lets_go
            migration.state.owner = transport.handed_over

    @staticmethod
    def _lets_go(transport: DestinationTransport) -> bool:
        """Whether the source gives its guest up without a word of ours, as far as is known."""
        return transport.source_lets_go and not (transport.final_ack or transport.has_return_path)

    # ---- device state ----

    def _load_device_state(
        self, migration: Migration, file: QEMUFile, transport: DestinationTransport
    ) -> None:
        data = self._parser.remainder()
        while True:
            self._scanner.feed(data)
            self.writer.append_device_state(data)
            if self._scanner.complete:
                return
            migration.emit(Progress("device-state", self._scanner.total, 0))
            if transport.has_return_path and not transport.final_ack:
                data = self._next_until_shut(file, transport)
                continue
            try:
                data = file.get()
            except PeerGone:
                # A machine may suppress the description: then its end is the connection's.
                if (
                    transport.disconnected
                    and self._scanner.closes_without_description
                    and not transport.has_return_path
                ):
                    return
                raise
            if not data:
                if self._scanner.closes_without_description:
                    if transport.end_is_sure:
                        return
                    raise no_description(transport.peer, file.position)
                raise StreamCut(transport.peer, file.position, "the rest of the device state")

    def _next_until_shut(self, file: QEMUFile, transport: DestinationTransport) -> bytes:
        """Wait for more device state from a QEMU that does not end the connection by itself.

        It waits for our word at the end, so a connection that ends earlier is a failure or a
        cancellation, and where the machine suppresses the description nothing shows the end.
        """
        if not self._scanner.closes_without_description:
            return file.get()
        try:
            with transport.silence_limited(_DESCRIPTION_SECONDS):
                return file.get()
        except MigrationTimeout as error:
            raise RemoteProtocolError(
                f"{transport.peer} seems to have sent all device state, without the description "
                "that its end is known by where there is a return path",
                remedy="switch return-path (QEMU up to 7.2: postcopy-ram) off at the source, or "
                "suppress-vmdesc of its machine",
            ) from error

    # ---- keeping it ----

    def _facts(self) -> StreamFacts:
        """What the snapshot's manifest takes from the stream.

        The footer of RAM's last section has not been seen yet where --sync is before; the sections
        ahead of it end in the same way.
        """
        assert self._head is not None
        assert self._start is not None
        return facts_of(self._head, self._start, self._shared, footers=self._footers)

    def _keep(self, migration: Migration, transport: DestinationTransport) -> None:
        assert self._ram is not None
        if not transport.final_ack and not transport.has_return_path:
            # A QEMU ends the connection itself, once it has seen its last message arrive.
            transport.wait_disconnected(_DISCONNECT_SECONDS)
        migration.state.step = "writing the snapshot"
        try:
            path = self.keeper.commit(
                migration,
                self._ram,
                self._facts(),
                self._scanner,
                keep_on_failure=transport.source_lets_go and not transport.has_return_path,
                named=not transport.has_return_path,
            )
        except MigrationError as error:
            if transport.final_ack:
                transport.acknowledge(FinalAck.fitted(1, error.message))
            raise
        migration.state.step = "telling the source that all is on disk"
        confirmed = "the source ended the connection after the whole stream"
        if transport.final_ack:
            self._acknowledge(migration, transport)
        if transport.has_return_path:
            path = self._tell(migration, transport)
            confirmed = "the source was told on its return path that everything is on disk"
        elif transport.final_ack:
            transport.wait_disconnected(_DISCONNECT_SECONDS)
            confirmed = "the source was told that everything is on disk"
        total = self._ram.total
        state = migration.state
        state.setup_seconds = transport.setup_seconds
        state.bytes_transferred = total
        state.owner = f"the virtual machine is whole in {path}"
        transfer = max(self._streamed - transport.setup_seconds, 1e-9)
        migration.emit(
            Completed(
                bytes=total,
                pages=total // TARGET_PAGE_SIZE,
                nonzero_bytes=self.keeper.nonzero,
                device_state_bytes=self._scanner.total,
                rounds=state.rounds,
                writes=0,
                normal_pages=0,
                duplicate_pages=0,
                setup_seconds=round(transport.setup_seconds, 6),
                transfer_seconds=round(transfer, 6),
                writing_seconds=round(
                    self.keeper.reserving_seconds + self.keeper.writing_seconds, 6
                ),
                bytes_per_second=round(total / transfer, 1),
                path=str(path),
                peer=transport.peer,
                confirmed=confirmed,
            )
        )

    def _acknowledge(self, migration: Migration, transport: DestinationTransport) -> None:
        hands_over = not transport.has_return_path
        if hands_over:
            migration.note_commit("destination", "FINAL_ACK", "before")
        transport.acknowledge(FinalAck(0))
        if hands_over:
            migration.note_commit("destination", "FINAL_ACK", "passed")

    def _tell(self, migration: Migration, transport: DestinationTransport) -> Path:
        """Let the source go, by the word that it waits for on its return path; return DIR.

        The snapshot is whole, and gets its name when the source has heard: at no time may both ends
        be taken for the machine's, not even when this process is killed in between.
        """
        migration.state.owner = _NOT_KNOWN
        migration.note_commit("destination", "SHUT", "before")
        try:
            transport.shut(_DISCONNECT_SECONDS)
        except MigrationError as error:
            error.remedy = "; ".join(
                part for part in (f"kept whole in {self.writer.kept_at}", error.remedy) if part
            )
            raise
        migration.note_commit("destination", "SHUT", "passed")
        migration.state.owner = f"the virtual machine is whole in {self.writer.kept_at}"
        return self.writer.publish()
