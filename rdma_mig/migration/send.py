# SPDX-License-Identifier: Apache-2.0
"""The source's engine for a machine that rests: a snapshot directory into a migration stream."""

from __future__ import annotations

import time

from rdma_mig.channel.counters import RamCounters
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import SourceTransport
from rdma_mig.errors import MigrationError, PeerGone, SnapshotError
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.memory.page_stream import PageWriter
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.events import Completed, Progress, Warned
from rdma_mig.migration.handover import hand_over
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_FINISH,
    RAM_CONTROL_SETUP,
    ram_control_after_iterate,
    ram_control_before_iterate,
)
from rdma_mig.migration.ram_save import ram_save_pages
from rdma_mig.migration.state import Migration, MigrationStatus
from rdma_mig.snapshot import Snapshot
from rdma_mig.wire.device_state import DeviceState
from rdma_mig.wire.return_path import RETURN_PATH_PING
from rdma_mig.wire.stream import (
    CommandType,
    StreamBlock,
    encode_command,
    encode_eos,
    encode_footer,
    encode_ram_start,
    encode_section_end,
)

__all__ = ["SnapshotSource"]


class SnapshotSource:
    """Sends a snapshot to a destination; ``save`` is its engine function.

    Args:
        snapshot: closed by its owner, after this.

    Attributes:
        ram: the guest's memory, filled by load().
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.ram = GuestRam(snapshot.blocks)
        self._loaded = 0
        self._load_seconds = 0.0

    def close(self) -> None:
        """Free the guest's memory."""
        self.ram.close()

    @property
    def owner(self) -> str:
        """Who owns the virtual machine as long as nothing was handed over."""
        return f"the snapshot in {self.snapshot.path} is unchanged"

    def load(self, migration: Migration) -> None:
        """Read RAM from disk into memory, each chunk compared with its digest.

        Raises:
            SnapshotError: it cannot be read, or is damaged.
            MigrationCancelled: it was cancelled.
        """
        migration.state.owner = self.owner
        began = time.monotonic()
        done = 0

        def progress(size: int) -> None:
            nonlocal done
            done += size
            if done % (64 << 20) < size:
                migration.emit(Progress("load", done, self.ram.total))

        for guest in self.ram:
            self._loaded += self.snapshot.load_ram(
                guest.index,
                guest.memory,
                lambda: migration.cancellation.requested,
                progress=progress,
            )
        self.ram.at_rest = True
        self._load_seconds = time.monotonic() - began

    def save(self, migration: Migration, file: QEMUFile, transport: SourceTransport) -> None:
        """Write the whole migration to ``file``.

        Raises:
            MigrationError: it failed, or success could not be shown.
        """
        migration.state.owner = self.owner
        migration.state.step = "agreeing on the RAM blocks"
        began = time.monotonic()
        manifest = self.snapshot.manifest
        footer = encode_footer(manifest.ram_section_id) if manifest.footers else b""
        file.put(self.snapshot.config)
        if transport.has_return_path:
            file.put(encode_command(CommandType.OPEN_RETURN_PATH))
            file.put(encode_command(CommandType.PING, RETURN_PATH_PING.to_bytes(4, "big")))
        file.put(
            encode_ram_start(
                manifest.ram_section_id,
                [
                    StreamBlock(block.idstr, block.length, block.page_size, block.guest_address)
                    for block, shared in manifest.listed
                    if transport.lists_shared or not shared
                ],
            )
        )
        migration.emit(Progress("setup", 0, self.ram.total))
        ram_control_before_iterate(file, RAM_CONTROL_SETUP)
        try:
            ram_control_after_iterate(file, RAM_CONTROL_SETUP)
        except PeerGone as error:
            # A QEMU whose RAM differs ends without a word to us.
            blocks = ", ".join(f"{b.idstr} {b.length >> 10} KiB" for b in self.snapshot.blocks)
            raise MigrationError(
                f"the destination did not take the RAM blocks ({error.message})",
                owner=self.owner,
                remedy="its own messages say why; start it with the machine and memory of the "
                f"source: {blocks}",
            ) from error
        file.put(encode_eos() + footer)
        migration.advance(MigrationStatus.ACTIVE)
        migration.state.step = "writing RAM"
        # The machine rests, so one last phase carries all RAM and there are no rounds before it.
        file.put(encode_section_end(manifest.ram_section_id))
        ram_control_before_iterate(file, RAM_CONTROL_FINISH)
        done = 0
        writer = PageWriter(self.ram)
        for guest in self.ram:
            ram_save_pages(file, self.ram, guest.index, writer=writer)
            done += guest.block.length
            migration.emit(Progress("transfer", done, self.ram.total))
        ram_control_after_iterate(file, RAM_CONTROL_FINISH)
        migration.note_round(last=True)
        migration.advance(MigrationStatus.DEVICE)
        file.put(encode_eos() + footer)
        file.flush()
        state = DeviceState(self.snapshot.device_state, self.snapshot.eof_offset, manifest.footers)
        confirmed = hand_over(migration, file, transport, state, owner=self.owner)
        ended = time.monotonic()
        confirmed = transport.finish() or confirmed
        migration.note_commit("source", "EOF", "passed")
        if transport.restores:
            self._note_restoration(migration, transport.peer)
        self._report(migration, transport, file.counters, ended - began, confirmed)

    def _note_restoration(self, migration: Migration, peer: str) -> None:
        """Write down that a QEMU has the machine now; not being able to undoes nothing."""
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        try:
            self.snapshot.note_restoration(f"{when} to {peer}")
        except SnapshotError as error:
            migration.emit(
                Warned(f"that this snapshot was restored is not noted in it: {error.message}")
            )

    def _report(
        self,
        migration: Migration,
        transport: SourceTransport,
        counters: RamCounters,
        seconds: float,
        confirmed: str,
    ) -> None:
        state = migration.state
        state.setup_seconds = transport.setup_seconds
        state.bytes_transferred = counters.normal_bytes
        transfer = max(seconds - transport.setup_seconds, 1e-9)
        migration.emit(
            Completed(
                bytes=counters.normal_bytes,
                pages=counters.normal_bytes // TARGET_PAGE_SIZE,
                nonzero_bytes=self._loaded,
                device_state_bytes=len(self.snapshot.device_state),
                rounds=state.rounds,
                writes=transport.writes,
                normal_pages=counters.normal_pages,
                duplicate_pages=counters.duplicate_pages,
                setup_seconds=round(transport.setup_seconds, 6),
                transfer_seconds=round(transfer, 6),
                writing_seconds=round(self._load_seconds, 6),
                bytes_per_second=round(counters.normal_bytes / transfer, 1),
                path=str(self.snapshot.path),
                peer=transport.peer,
                confirmed=confirmed,
            )
        )
