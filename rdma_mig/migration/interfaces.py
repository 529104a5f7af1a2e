# SPDX-License-Identifier: Apache-2.0
"""What the engine wants of a guest, and what a transport gives to an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rdma_mig.memory.dirty import DirtyTracker
from rdma_mig.memory.ram import GuestRam
from rdma_mig.wire.device_state import DeviceState
from rdma_mig.wire.stream import RamStart, StreamHead

if TYPE_CHECKING:
    from rdma_mig.migration.engines import Process, Save
    from rdma_mig.migration.state import Migration

__all__ = ["API_VERSION", "DirtyTracker", "Guest", "Transport"]

API_VERSION = 1
"""Of these interfaces; it grows when one of them changes so that users must change."""


@runtime_checkable
class Guest(Protocol):
    """A machine that can be migrated, or loaded into. Called on the migration's worker thread.

    Attributes:
        api_version: `API_VERSION` that it was written for.
        machine: its type, which both ends must agree on.
        ram: its memory; at a destination, after ``prepare``. It must outlive the migration.
        tracker: finds what it writes; None if it rests for the whole migration.
    """

    api_version: int
    machine: str
    tracker: DirtyTracker | None

    @property
    def ram(self) -> GuestRam:
        """Its memory."""
        ...

    def stop(self) -> None:
        """Source: from the return on, nothing writes its RAM or changes its devices.

        Also called, and followed by ``resume``, whenever a tracker that is not atomic is asked.
        """
        ...

    def resume(self) -> None:
        """Run: at the source after a failure, at the destination when all is loaded."""
        ...

    def throttle(self, percentage: int) -> None:
        """Source: take so much of its time from it, 0 to 99; 0 ends that."""
        ...

    def save_device_state(self) -> DeviceState:
        """Source, stopped: everything that is not RAM."""
        ...

    def prepare(self, head: StreamHead, start: RamStart) -> GuestRam:
        """Destination: agree on machine and blocks, and return the memory to load RAM into.

        Raises:
            MigrationError: this is not a machine that can be loaded here.
        """
        ...

    def load_device_state(self, state: DeviceState) -> None:
        """Destination, RAM being whole: take everything else.

        Raises:
            MigrationError: it cannot be taken; the source goes on then.
        """
        ...


class Transport(Protocol):
    """Moves a stream, and RAM beside it where it can.

    Attributes:
        api_version: `API_VERSION` that it was written for.
        scheme: what its URIs begin with, without the colon.
    """

    api_version: int
    scheme: str

    def start_incoming(
        self,
        uri: str,
        *,
        migration: Migration,
        process: Process,
        **options: Any,
    ) -> str:
        """Listen; return the URI to connect to. ``process`` runs on the worker, connected."""
        ...

    def start_outgoing(
        self,
        uri: str,
        *,
        migration: Migration,
        ram: GuestRam,
        save: Save,
        **options: Any,
    ) -> None:
        """Connect to a destination; ``save`` runs on the worker, connected.

        The file that it is given carries the hooks of the transport, or none.
        """
        ...
