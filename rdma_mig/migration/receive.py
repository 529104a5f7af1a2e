# SPDX-License-Identifier: Apache-2.0
"""The destination's engine: a migration stream into a snapshot directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import (
    HostError,
    MigrationError,
    PeerGone,
    RemoteProtocolError,
    SnapshotError,
)
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE, RamBlock
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.events import Completed, Progress, Warned
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_BLOCK_REG,
    RAM_CONTROL_HOOK,
    ram_control_load_hook,
)
from rdma_mig.migration.shared_blocks import SharedBlocks, choose_shared
from rdma_mig.migration.state import Migration, MigrationStatus
from rdma_mig.snapshot import SharedBlock, SnapshotWriter
from rdma_mig.transport.incoming import RdmaIncoming
from rdma_mig.wire.control import FinalAck
from rdma_mig.wire.description import DeviceStateScanner
from rdma_mig.wire.stream import (
    Command,
    Event,
    Hook,
    RamEnd,
    RamPart,
    RamStart,
    SectionEnd,
    StreamHead,
    StreamParser,
)

__all__ = ["SnapshotDestination", "available_memory"]

_AT_SOURCE = "the virtual machine is still the source's and goes on running there"
_COMMITTED = (
    "the source has handed over and holds its virtual machine stopped (QEMU: postmigrate); "
    "`cont` there resumes it"
)
_DISCONNECT_SECONDS = 10.0
# What this process needs beside the guest's RAM.
_OVERHEAD = 96 << 20


def available_memory() -> int:
    """Return the bytes that this host can still give to processes (MemAvailable)."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise HostError("/proc/meminfo does not say how much memory is available")


class SnapshotDestination:
    """Loads one migration and keeps it as a snapshot; ``process`` is its engine function.

    Args:
        path: the snapshot directory; must not exist.
        shared_blocks: names of the RAM blocks that a source with x-ignore-shared keeps to itself,
            `NO_SHARED_BLOCKS` for none; None to guess.

    Raises:
        SnapshotError: it cannot be written there.
    """

    def __init__(self, path: str | Path, shared_blocks: Sequence[str] | None = None) -> None:
        self.writer = SnapshotWriter(path)
        self._named_shared = shared_blocks
        self._shared = SharedBlocks()
        self._parser = StreamParser()
        self._scanner = DeviceStateScanner()
        self._head: StreamHead | None = None
        self._start: RamStart | None = None
        self._ram: GuestRam | None = None
        self._footers = True
        self._nonzero = 0
        self._began = 0.0
        self._transferred = 0.0
        self._written = 0.0
        self._reserved = 0.0
        self._committed = False

    def close(self) -> None:
        """Free the guest's memory; remove what was written unless it is to be kept."""
        if self._ram is not None:
            self._ram.close()
        if self.writer.keep_on_failure and not self._committed:
            self.writer.keep_incomplete()
        self.writer.abandon()

    def process(self, migration: Migration, file: QEMUFile, transport: RdmaIncoming) -> None:
        """Load the stream from ``file`` and write the snapshot.

        Raises:
            MigrationError: it failed; its ``owner`` says who owns the virtual machine.
        """
        migration.state.owner = _AT_SOURCE
        self._began = time.monotonic()
        try:
            self._load_ram(migration, file, transport)
            self._load_device_state(migration, file, transport)
            self._transferred = time.monotonic()
            self._keep(migration, transport)
        except MigrationError as error:
            if not error.owner:
                error.owner = migration.state.owner
            if isinstance(error, PeerGone) and transport.phases == 0 and self._shared.asked:
                # How a source ends that is offered other blocks than those it would send.
                error.remedy = self._shared.remedy
            if self.writer.keep_on_failure and self.writer.kept_at is None:
                kept = self._rescue(migration)
                error.remedy = "; ".join(part for part in (kept, error.remedy) if part)
            raise

    # ---- RAM ----

    def _load_ram(self, migration: Migration, file: QEMUFile, transport: RdmaIncoming) -> None:
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

    def _handle(
        self, event: Event, migration: Migration, file: QEMUFile, transport: RdmaIncoming
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
                migration.emit(Warned(f"the source's command {event.command.name} is ignored"))
            case RamStart():
                self._start_ram(event, migration, file, transport)
            case Hook():
                ram_control_load_hook(file, RAM_CONTROL_HOOK)
                if migration.state.status is MigrationStatus.DEVICE:
                    self._commit_point(migration, transport)
            case RamPart():
                migration.state.rounds += 1
                migration.emit(Progress("round", migration.state.rounds, 0))
            case RamEnd():
                migration.state.rounds += 1
                migration.state.status = MigrationStatus.DEVICE
                migration.emit(Progress("round", migration.state.rounds, 0))
            case SectionEnd():
                self._footers = event.has_footer
                if event.kind == "end" and not self.writer.keep_on_failure:
                    raise RemoteProtocolError(
                        f"{transport.peer} ended the RAM section without a last RDMA phase"
                    )

    def _start_ram(
        self, start: RamStart, migration: Migration, file: QEMUFile, transport: RdmaIncoming
    ) -> None:
        assert self._head is not None
        self._shared = choose_shared(self._head, start.blocks, self._named_shared)
        if self._shared.warning:
            migration.emit(Warned(self._shared.warning))
        kept = [block for block in start.blocks if block.idstr not in self._shared.names]
        total = sum(block.length for block in kept)
        available = available_memory()
        if total + _OVERHEAD > available:
            raise HostError(
                f"the source announces {total >> 20} MiB of RAM and this host has "
                f"{available >> 20} MiB available",
                remedy="free memory here, or migrate to a host with more",
            )
        self._start = start
        self._ram = GuestRam(
            [
                RamBlock(block.idstr, block.length, block.page_size, block.guest_address)
                for block in kept
            ]
        )
        for guest in self._ram:
            ram_control_load_hook(file, RAM_CONTROL_BLOCK_REG, guest.block.idstr)
        transport.attach(self._ram)
        migration.emit(Progress("setup", 0, total))

    def _commit_point(self, migration: Migration, transport: RdmaIncoming) -> None:
        """Be sure of RAM before the source may go on to what makes it let go of the machine.

        The READY for the first message after this phase is what lets a QEMU source complete. Up
        to here a failure leaves the guest running there; so everything that can fail is done
        first: nobody can change RAM any more, and the disk has room for all of it.
        """
        assert self._ram is not None
        transport.withdraw_keys()
        began = time.monotonic()
        self._nonzero = self.writer.reserve(
            [(guest.block, guest.memory) for guest in self._ram],
            should_stop=lambda: migration.cancellation.requested,
        )
        self._reserved = time.monotonic() - began
        self.writer.keep_on_failure = True
        migration.state.owner = _COMMITTED

    # ---- device state ----

    def _load_device_state(
        self, migration: Migration, file: QEMUFile, transport: RdmaIncoming
    ) -> None:
        data = self._parser.remainder()
        while True:
            self._scanner.feed(data)
            self.writer.append_device_state(data)
            if self._scanner.complete:
                return
            migration.emit(Progress("device-state", self._scanner.total, 0))
            try:
                data = file.get()
            except PeerGone:
                # A machine may suppress the description: then its end is the connection's.
                if transport.disconnected and self._scanner.closes_without_description:
                    return
                raise
            if not data:
                if self._scanner.closes_without_description:
                    return
                raise RemoteProtocolError(
                    f"{transport.peer} ended the stream within the device state"
                )

    # ---- keeping it ----

    def _rescue(self, migration: Migration) -> str:
        """Keep what there is after a failure behind the commit point; say what, and where.

        Writing RAM takes as long as it takes; after a cancellation nobody wants to wait for it.
        """
        what = "device state without RAM"
        if not migration.cancellation.requested and self._ram is not None:
            try:
                for guest in self._ram:
                    self.writer.write_ram(guest.index)
                what = "RAM and device state as far as it came"
            except SnapshotError:
                what = "what could be written"
        return f"kept in {self.writer.keep_incomplete()}: {what}"

    def _keep(self, migration: Migration, transport: RdmaIncoming) -> None:
        assert self._head is not None
        assert self._head.machine is not None
        assert self._start is not None
        assert self._ram is not None
        if not transport.final_ack:
            # A QEMU ends the connection itself, once it has seen its last message arrive.
            transport.wait_disconnected(_DISCONNECT_SECONDS)
        began = time.monotonic()
        written = 0

        def progress(size: int) -> None:
            nonlocal written
            written += size
            if written % (64 << 20) < size:
                migration.emit(Progress("write", written, self._nonzero))

        try:
            for guest in self._ram:
                self.writer.write_ram(
                    guest.index, lambda: migration.cancellation.requested, progress
                )
            if self._scanner.complete:
                self.writer.set_description(self._scanner.description)
            path = self.writer.commit(
                machine=self._head.machine,
                ram_section_id=self._start.section_id,
                footers=self._footers,
                eof_offset=self._scanner.eof_offset,
                shared=[
                    SharedBlock(
                        position,
                        RamBlock(block.idstr, block.length, None, block.guest_address),
                    )
                    for position, block in enumerate(self._start.blocks)
                    if block.idstr in self._shared.names
                ],
            )
        except MigrationError as error:
            if transport.final_ack:
                transport.acknowledge(FinalAck.fitted(1, error.message))
            raise
        self._committed = True
        self._written = time.monotonic()
        confirmed = "the source ended the connection after the whole stream"
        if transport.final_ack:
            transport.acknowledge(FinalAck(0))
            transport.wait_disconnected(_DISCONNECT_SECONDS)
            confirmed = "the source was told that everything is on disk"
        total = self._ram.total
        state = migration.state
        state.setup_seconds = transport.setup_seconds
        state.bytes_transferred = total
        state.owner = f"the virtual machine is whole in {path}"
        streamed = self._transferred - self._began
        transfer = max(streamed - transport.setup_seconds - self._reserved, 1e-9)
        migration.emit(
            Completed(
                bytes=total,
                pages=total // TARGET_PAGE_SIZE,
                nonzero_bytes=self._nonzero,
                device_state_bytes=self._scanner.total,
                rounds=state.rounds,
                writes=0,
                normal_pages=0,
                duplicate_pages=0,
                setup_seconds=round(transport.setup_seconds, 6),
                transfer_seconds=round(transfer, 6),
                writing_seconds=round(self._reserved + self._written - began, 6),
                bytes_per_second=round(total / transfer, 1),
                path=str(path),
                peer=transport.peer,
                confirmed=confirmed,
            )
        )
