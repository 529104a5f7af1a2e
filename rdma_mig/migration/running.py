# SPDX-License-Identifier: Apache-2.0
"""An engine's work over a transport that is connected, and what becomes of the transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from rdma_mig.channel.qemufile import ByteChannel, QEMUFile, RamControlHooks
from rdma_mig.errors import MigrationError
from rdma_mig.migration.events import MigrationEvent
from rdma_mig.migration.failures import complete_failure
from rdma_mig.migration.state import Migration

__all__ = ["run_engine"]


class _Transport(ByteChannel, Protocol):
    @property
    def peer(self) -> str: ...

    def abort(self) -> None: ...


_T = TypeVar("_T", bound=_Transport)


def run_engine(
    migration: Migration,
    transport: _T,
    engine: Callable[[Migration, QEMUFile, _T], None],
    *,
    other: str,
    tell: Sequence[MigrationEvent],
    hooks: RamControlHooks | None = None,
) -> None:
    """Let an engine load or save. Whatever happens, the transport is closed.

    Args:
        migration: on whose worker this runs.
        transport: connected; its other end is told when this one fails.
        engine: given the migration, the stream's file, and the transport.
        other: what the other end is, for messages: "source" or "destination".
        tell: events that come first.
        hooks: of the file; None where RAM goes by the stream.

    Raises:
        MigrationError: why it failed, with the other end's name and what to do.
    """
    try:
        for event in tell:
            migration.emit(event)
        file = QEMUFile(transport, hooks)
        migration.connected(file)
        engine(migration, file, transport)
    except MigrationError as error:
        complete_failure(error, transport.peer, other)
        transport.abort()
        raise
    finally:
        transport.close()
