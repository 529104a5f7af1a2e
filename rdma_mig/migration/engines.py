# SPDX-License-Identifier: Apache-2.0
"""What ``*_start_*`` functions run when nothing else is given: the header's one migration.

In the header they take neither an engine nor RAM, and destinations not even a state: QEMU has one
machine and one migration. Here that is what `migrate_get_current` returns, and its guest. The
engines for it are loaded when they are needed: who brings one starts without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import DestinationTransport, SourceTransport
from rdma_mig.migration.notifiers import require_unblocked
from rdma_mig.migration.state import Migration, migrate_get_current
from rdma_mig.migration.status import MigrationState

__all__ = ["Process", "Save", "incoming_engine", "outgoing_engine"]

Process = Callable[[Migration, QEMUFile, DestinationTransport], None]
"""An engine's function that loads the stream from the file."""

Save = Callable[[Migration, QEMUFile, SourceTransport], None]
"""An engine's function that writes the stream to the file."""

_Transport = TypeVar("_Transport")
_Engine = Callable[[Migration, QEMUFile, _Transport], None]


def incoming_engine(
    migration: Migration | None, process: _Engine[_Transport] | None
) -> tuple[Migration, _Engine[_Transport]]:
    """Return what a ``*_start_incoming_migration`` starts, and what it processes a stream with.

    Args:
        migration: None for the process's own, with what is set for it.
        process: None for `process_incoming_migration`.

    Raises:
        UsageError: nothing is given, and there is no guest to load into.
        LocalProtocolError: the process's migration is under way.
    """
    if migration is None:
        migration = Migration.of(migrate_get_current())
    if process is not None:
        return migration, process
    migration.state.require_guest()
    from rdma_mig.migration.current import process_incoming_migration

    return migration, lambda _migration, file, _transport: process_incoming_migration(file)


def outgoing_engine(
    state: Migration | MigrationState,
    save: _Engine[_Transport] | None,
    total_seconds: float | None,
) -> tuple[Migration, _Engine[_Transport]]:
    """Return what a ``*_start_outgoing_migration`` starts, and what it saves with.

    Args:
        state: with the header's `MigrationState`, a migration is made with what is set there.
        save: None for `migrate_fd_connect`.
        total_seconds: limit on it; None for none.

    Raises:
        UsageError: block devices were asked for; or nothing is given, and there is no guest.
        LocalProtocolError: the state's migration is under way.
        MigrationError: migrations are blocked (`migrate_add_blocker`).
    """
    require_unblocked()
    migration = Migration.of(state)
    migration.state.params.check()
    if save is not None:
        return migration, save
    migration.state.require_guest()
    from rdma_mig.migration.current import migrate_fd_connect

    return migration, lambda work, _file, _transport: migrate_fd_connect(
        work.state, total_seconds=total_seconds
    )
