# SPDX-License-Identifier: Apache-2.0
"""What a destination has received, onto disk; and what a failure leaves of it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from rdma_mig.errors import HostError, SnapshotError
from rdma_mig.memory.blocks import RamBlock
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.custody import Custody
from rdma_mig.migration.events import Progress, Warned
from rdma_mig.migration.shared_blocks import SharedBlocks
from rdma_mig.migration.state import Migration
from rdma_mig.snapshot import SharedBlock, SnapshotWriter, StreamFacts
from rdma_mig.wire.description import DeviceStateScanner
from rdma_mig.wire.stream import RamStart, StreamHead

__all__ = ["SnapshotKeeper", "facts_of"]


def facts_of(
    head: StreamHead, start: RamStart, shared: SharedBlocks, *, footers: bool
) -> StreamFacts:
    """Gather what a manifest takes from the stream; the head must name a machine."""
    assert head.machine is not None
    blocks = tuple(
        SharedBlock(position, RamBlock(block.idstr, block.length, None, block.guest_address))
        for position, block in enumerate(start.blocks)
        if block.idstr in shared.names
    )
    return StreamFacts(head.machine, start.section_id, footers, blocks)


class SnapshotKeeper:
    """Keeps one machine as a snapshot.

    Args:
        path: the snapshot directory; must not exist.
        custodian: start a process that finishes it, should this one be killed.

    Attributes:
        writer: of the directory.
        nonzero: bytes of RAM in pages that are not zero, once it is written; before, what room was
            made for.
        committed: the snapshot has its name.
        reserving_seconds: making room, and writing RAM where that was done with it.
        writing_seconds: from the commit's begin to its end.

    Raises:
        SnapshotError: it cannot be written there.
    """

    def __init__(self, path: str | Path, *, custodian: bool = False) -> None:
        self.writer = SnapshotWriter(path)
        self._custody: Custody | None = None
        self._custodian_due = True
        self._unguarded = ""
        if custodian:
            try:
                self._custody = Custody(self.writer.partial)
            except HostError as error:
                self._unguarded = error.message
        self.nonzero = 0
        self.committed = False
        self.reserving_seconds = 0.0
        self.writing_seconds = 0.0
        self._has_room = False
        self._ram_is_written = False

    def close(self) -> None:
        """Remove what was written, unless it is to be kept."""
        if self.writer.keep_on_failure and not self.committed:
            self.writer.keep_incomplete()
        self.writer.abandon()
        # Behind all of that, which it would do if this process were killed meanwhile.
        self.dismiss_custodian()

    # ---- the custodian ----

    def wait_custodian(self, migration: Migration) -> None:
        """Wait, once, until the custodian is at work, if there is to be one; else all goes on."""
        if not self._custodian_due:
            return
        self._custodian_due = False
        if self._custody is not None:
            try:
                self._custody.wait_ready(migration.cancellation)
            except HostError as error:
                self._do_without(migration, error.message)
        elif self._unguarded:
            self._do_without(migration, self._unguarded)

    def entrust(self, migration: Migration, facts: StreamFacts) -> None:
        """Hand RAM, of which space was set aside for, to the custodian, if there is one."""
        if self._custody is None:
            return
        try:
            self._custody.entrust(self.writer.entrust(facts), migration.cancellation)
        except HostError as error:
            self._do_without(migration, error.message)

    def _do_without(self, migration: Migration, why: str) -> None:
        self.dismiss_custodian()
        migration.emit(
            Warned(
                f"{why}: should this process be killed before RAM has been written, it is lost "
                "here, and `cont` at the source resumes its guest (--sync before needs no such "
                "process)"
            )
        )

    def dismiss_custodian(self) -> None:
        """End it: this process has ended in order, or needs none."""
        self._custodian_due = False
        custody, self._custody = self._custody, None
        if custody is not None:
            custody.close()

    # ---- RAM ----

    def reserve(self, migration: Migration, ram: GuestRam, write: StreamFacts | None) -> None:
        """Make room on disk for all of RAM; and write it, noting ``write`` with it, if given.

        Raises:
            SnapshotError: there is no room, or it could not be written.
        """
        began = time.monotonic()
        self.nonzero = self.writer.reserve(
            [(guest.block, guest.memory) for guest in ram],
            should_stop=lambda: migration.cancellation.requested,
        )
        self._has_room = True
        if write is not None:
            self._write_ram(migration, ram)
            # Should this process be killed, `rdma-migrate recover` goes on from it.
            self.writer.note_written(write)
        self.reserving_seconds = time.monotonic() - began

    def _write_ram(self, migration: Migration, ram: GuestRam) -> None:
        written = 0

        def progress(size: int) -> None:
            nonlocal written
            written += size
            if written % (64 << 20) < size:
                migration.emit(Progress("write", written, self.nonzero))

        self.nonzero = sum(
            self.writer.write_ram(guest.index, lambda: migration.cancellation.requested, progress)
            for guest in ram
        )
        self._ram_is_written = True

    def _try_note_written(self, facts: StreamFacts) -> None:
        # Behind the commit point space is set aside for all that a snapshot needs, and not for
        # this: it is no reason to fail.
        with contextlib.suppress(SnapshotError):
            self.writer.note_written(facts)

    def rescue(self, migration: Migration, ram: GuestRam | None, facts: StreamFacts) -> str:
        """Keep what there is after a failure behind the commit point; say what, and where.

        Writing RAM takes as long as it takes; after a cancellation nobody wants to wait for it.
        """
        what = "device state without RAM"
        if self._ram_is_written:
            what = "RAM and device state as far as it came"
        elif not migration.cancellation.requested and ram is not None:
            try:
                for guest in ram:
                    self.writer.write_ram(guest.index)
                self._try_note_written(facts)
                what = "RAM and device state as far as it came"
            except SnapshotError:
                what = "what could be written"
        return f"kept in {self.writer.keep_incomplete()}: {what}"

    def commit(
        self,
        migration: Migration,
        ram: GuestRam,
        facts: StreamFacts,
        scanner: DeviceStateScanner,
        *,
        keep_on_failure: bool,
        named: bool = True,
    ) -> Path:
        """Write what is not written yet, and give the directory its name.

        Args:
            migration: told of progress; its cancellation ends this.
            ram: the guest's.
            facts: of the stream.
            scanner: fed with all device state.
            keep_on_failure: whether a failure leaves what there is.
            named: whether it gets its name at once, or by the writer's `publish`.

        Returns:
            the snapshot's directory.

        Raises:
            SnapshotError: it could not be written.
        """
        if not self._has_room:
            self.reserve(migration, ram, None)
        began = time.monotonic()
        if not self._ram_is_written:
            self._write_ram(migration, ram)
            self._try_note_written(facts)
        if scanner.complete:
            self.writer.set_description(scanner.description)
        path = self.writer.commit(
            facts, eof_offset=scanner.eof_offset, keep_on_failure=keep_on_failure, named=named
        )
        self.committed = True
        self.writing_seconds = time.monotonic() - began
        return path
