# SPDX-License-Identifier: Apache-2.0
"""The RDMA transport as a plugin: the entry point ``rdma`` of ``rdma_mig.transports``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import UsageError
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.interfaces import API_VERSION
from rdma_mig.migration.state import Migration

__all__ = ["RdmaTransport"]


class RdmaTransport:
    """Migrations over RDMA; its files carry hooks. Options are those of `RdmaOptions`."""

    api_version = API_VERSION
    scheme = "rdma"

    def start_incoming(
        self,
        uri: str,
        *,
        migration: Migration,
        process: Callable[[Migration, QEMUFile, Any], None],
        **options: Any,
    ) -> str:
        """Listen at ``rdma:HOST:PORT``; port 0 takes a free one.

        Returns:
            the URI to connect to.

        Raises:
            UsageError, HostError, LocalProtocolError: as ``rdma_start_incoming_migration``.
        """
        from rdma_mig.migration.rdma import rdma_start_incoming_migration

        address = rdma_start_incoming_migration(
            uri, migration=migration, process=process, options=_options(options)
        )
        return str(address)

    def start_outgoing(
        self,
        uri: str,
        *,
        migration: Migration,
        ram: GuestRam,
        save: Callable[[Migration, QEMUFile, Any], None],
        **options: Any,
    ) -> None:
        """Connect to ``rdma:HOST:PORT``, and save.

        Raises:
            UsageError, HostError, LocalProtocolError: as ``rdma_start_outgoing_migration``.
        """
        from rdma_mig.migration.rdma import rdma_start_outgoing_migration

        rdma_start_outgoing_migration(migration, uri, ram=ram, save=save, options=_options(options))


def _options(options: dict[str, Any]) -> Any:
    from rdma_mig.migration.rdma import RdmaOptions

    try:
        return RdmaOptions(**options)
    except TypeError as error:
        raise UsageError(f"an option that RDMA does not have: {error}") from None
