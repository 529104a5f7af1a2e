# SPDX-License-Identifier: Apache-2.0
"""Migrations to and from any URI: the transport follows from its scheme, and is loaded then."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rdma_mig.migration.options import ChannelOptions
from rdma_mig.migration.state import Migration, MigrationState
from rdma_mig.migration.status import MigrationCapability
from rdma_mig.wire.uri import RdmaAddress, parse_uri

if TYPE_CHECKING:
    from rdma_mig.memory.ram import GuestRam
    from rdma_mig.migration.engines import Process, Save
    from rdma_mig.migration.rdma import RdmaOptions

__all__ = ["qemu_start_incoming_migration", "qemu_start_outgoing_migration"]


def qemu_start_incoming_migration(
    uri: str,
    *,
    migration: Migration | None = None,
    process: Process | None = None,
    options: ChannelOptions | None = None,
    rdma: RdmaOptions | None = None,
) -> str:
    """Await a source at a URI, and process its migration on the worker thread.

    Args:
        uri: ``rdma:``, ``tcp:``, ``unix:``, ``fd:``, ``exec:`` or ``file:``.
        migration: owns what is started; becomes the process's current one. None, as in the
            header: the process's own, with what is set for it.
        process: loads the stream from the file; None for `process_incoming_migration`.
        options: what all transports have.
        rdma: what RDMA has beside that; the others pass it over.

    Returns:
        the URI that a source can connect to.

    Raises:
        UsageError: the URI cannot be used, or not with these options.
        HostError: this host cannot do it.
        LocalProtocolError: another migration is under way.
    """
    address = parse_uri(uri, listening=True)
    options = options or ChannelOptions()
    if not isinstance(address, RdmaAddress):
        from rdma_mig.migration.channels import start_incoming

        return start_incoming(address, migration=migration, process=process, options=options)
    from rdma_mig.migration.rdma import rdma_start_incoming_migration

    bound = rdma_start_incoming_migration(
        uri, migration=migration, process=process, options=_merged(options, rdma)
    )
    return str(bound)


def qemu_start_outgoing_migration(
    state: Migration | MigrationState,
    uri: str,
    *,
    ram: GuestRam | None = None,
    save: Save | None = None,
    options: ChannelOptions | None = None,
    rdma: RdmaOptions | None = None,
) -> None:
    """Connect to a destination at a URI, and save to it on the worker thread.

    Args:
        state: the migration that owns what is started; becomes the process's current one. With
            the header's `MigrationState`, one is made with what is set there.
        uri: ``rdma:``, ``tcp:``, ``unix:``, ``fd:``, ``exec:`` or ``file:``.
        ram: the guest's; it must outlive the migration. None for that of the state's guest.
        save: writes the stream to the file; None for `migrate_fd_connect`.
        options: what all transports have.
        rdma: what RDMA has beside that, else what the capabilities say; the others pass it over.

    Raises:
        UsageError: the URI cannot be used, or not with these options.
        HostError: this host cannot do it.
        LocalProtocolError: another migration is under way.
        MigrationError: migrations are blocked (`migrate_add_blocker`).
    """
    address = parse_uri(uri, listening=False)
    options = options or ChannelOptions()
    if not isinstance(address, RdmaAddress):
        from rdma_mig.migration.channels import start_outgoing

        start_outgoing(state, address, save=save, options=options)
        return
    from rdma_mig.migration.rdma import RdmaOptions, rdma_start_outgoing_migration

    if rdma is None:
        settings = state.state if isinstance(state, Migration) else state
        rdma = RdmaOptions(pin_all=settings.enabled(MigrationCapability.RDMA_PIN_ALL))
    rdma_start_outgoing_migration(state, uri, ram=ram, save=save, options=_merged(options, rdma))


def _merged(options: ChannelOptions, rdma: RdmaOptions | None) -> RdmaOptions:
    from rdma_mig.migration.rdma import RdmaOptions

    return replace(
        rdma or RdmaOptions(),
        return_path=bool(options.return_path),
        allow=options.allow,
        total_seconds=options.total_seconds,
        stall_seconds=options.stall_seconds,
        accept_seconds=options.accept_seconds,
    )
