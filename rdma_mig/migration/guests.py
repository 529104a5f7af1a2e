# SPDX-License-Identifier: Apache-2.0
"""Two guests for the engine: a snapshot directory, and the memory of a live process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rdma_mig.closing import Closing
from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.memory.blocks import RamBlock
from rdma_mig.memory.dirty import DirtyTracker
from rdma_mig.memory.ram import GuestRam, require_memory
from rdma_mig.migration.interfaces import API_VERSION
from rdma_mig.snapshot import Snapshot, SnapshotWriter, StreamFacts
from rdma_mig.wire.device_state import DeviceState, decode_sole_device, encode_sole_device
from rdma_mig.wire.stream import RamStart, StreamHead

__all__ = ["ProcessGuest", "SnapshotGuest"]

_PROCESS_SECTION_ID = 3
_PROCESS_IDSTR = "process"


class ProcessGuest(Closing):
    """A process that offers memory of its own for migration. To be derived from.

    A class of one's own says how its writers stop and go on, and turns what else there is into
    bytes and back. Whoever writes to ``ram`` does so in a way that ``tracker`` finds.

    Args:
        machine: a name for what this is; a destination takes no other.
        blocks: its memory; at both ends the same.
        ram: memory that there is already; made of ``blocks`` if None, and then closed with this.
    """

    api_version = API_VERSION

    def __init__(
        self, machine: str, blocks: Sequence[RamBlock] = (), ram: GuestRam | None = None
    ) -> None:
        self.machine = machine
        self._owns_ram = ram is None
        self._ram = GuestRam(blocks) if ram is None else ram
        self.tracker: DirtyTracker | None = None

    @property
    def ram(self) -> GuestRam:
        """Its memory."""
        return self._ram

    def stop(self) -> None:
        """Stop all writers; return when none writes any more."""

    def resume(self) -> None:
        """Let the writers write."""

    def throttle(self, percentage: int) -> None:
        """Take that much of the writers' time from them."""

    def save_state(self) -> bytes:
        """Return what is not in RAM."""
        return b""

    def load_state(self, state: bytes) -> None:
        """Take over what ``save_state`` has returned at the source."""

    def save_device_state(self) -> DeviceState:
        """Put ``save_state`` into the form of a stream."""
        return encode_sole_device(_PROCESS_IDSTR, self.save_state(), section_id=_PROCESS_SECTION_ID)

    def load_device_state(self, state: DeviceState) -> None:
        """Take ``load_state`` out of the form of a stream."""
        self.load_state(decode_sole_device(state, _PROCESS_IDSTR))

    def prepare(self, head: StreamHead, start: RamStart) -> GuestRam:
        """Compare machine and blocks with what is here.

        Raises:
            RemoteProtocolError: they differ.
        """
        if head.machine != self.machine:
            raise RemoteProtocolError(
                f"the source has machine {head.machine!r}, this is {self.machine!r}"
            )
        theirs = [(block.idstr, block.length) for block in start.blocks]
        ours = [(guest.block.idstr, guest.block.length) for guest in self._ram]
        if theirs != ours:
            raise RemoteProtocolError(
                f"the source has RAM blocks {_listed(theirs)}, here are {_listed(ours)}"
            )
        return self._ram

    def close(self) -> None:
        """Free its memory. Idempotent."""
        if self._owns_ram:
            self._ram.close()


def _listed(blocks: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name!r} of {length} bytes" for name, length in blocks[:8])


class SnapshotGuest(Closing):
    """A snapshot directory as a guest: it rests, and runs nowhere.

    Args:
        path: a snapshot to send, if it exists; else the one to write.

    Raises:
        SnapshotError: it is damaged, or cannot be written there.
    """

    api_version = API_VERSION
    tracker: DirtyTracker | None = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.machine = ""
        self._ram: GuestRam | None = None
        self._snapshot: Snapshot | None = None
        self._writer: SnapshotWriter | None = None
        self._section_id = 0
        if not self.path.exists():
            self._writer = SnapshotWriter(path)
            return
        self._snapshot = Snapshot.open(path)
        try:
            self.machine = self._snapshot.machine
            self._ram = GuestRam(self._snapshot.blocks)
            for guest in self._ram:
                self._snapshot.load_ram(guest.index, guest.memory)
        except BaseException:
            self.close()
            raise

    @property
    def ram(self) -> GuestRam:
        """Its memory: of the snapshot, or what has been loaded."""
        if self._ram is None:
            raise LocalProtocolError(f"nothing has been loaded into {self.path}")
        return self._ram

    def stop(self) -> None:
        """It rests."""

    def resume(self) -> None:
        """It rests on."""

    def throttle(self, percentage: int) -> None:
        """It writes nothing that could be slowed down."""

    def save_device_state(self) -> DeviceState:
        """Return the device state as it was kept."""
        if self._snapshot is None:
            raise LocalProtocolError(f"{self.path} is being written")
        manifest = self._snapshot.manifest
        return DeviceState(self._snapshot.device_state, manifest.eof_offset, manifest.footers)

    def prepare(self, head: StreamHead, start: RamStart) -> GuestRam:
        """Take whatever machine comes."""
        if self._writer is None:
            raise LocalProtocolError(f"there already is a snapshot in {self.path}")
        if head.machine is None:
            raise RemoteProtocolError(
                "the stream does not say which machine it belongs to",
                remedy="start the source without migration.send-configuration=off",
            )
        require_memory(block.length for block in start.blocks)
        self.machine = head.machine
        self._section_id = start.section_id
        self._writer.write_config(head.raw)
        self._ram = GuestRam([RamBlock(b.idstr, b.length) for b in start.blocks])
        return self._ram

    def load_device_state(self, state: DeviceState) -> None:
        """Write everything to disk: after this the snapshot has its name."""
        assert self._writer is not None
        writer, ram = self._writer, self.ram
        writer.reserve([(guest.block, guest.memory) for guest in ram])
        for guest in ram:
            writer.write_ram(guest.index)
        writer.append_device_state(state.raw)
        description = state.raw[state.eof_offset + 5 :]
        if description:
            writer.set_description(description)
        writer.commit(
            StreamFacts(self.machine, self._section_id, state.footers),
            eof_offset=state.eof_offset,
            keep_on_failure=False,
        )

    def close(self) -> None:
        """Free its memory; what was not written whole is gone. Idempotent."""
        if self._ram is not None:
            self._ram.close()
        if self._snapshot is not None:
            self._snapshot.close()
        if self._writer is not None:
            self._writer.abandon()
