# SPDX-License-Identifier: Apache-2.0
"""The transports as plugins: the entry points of ``rdma_mig.transports``, one for each scheme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from rdma_mig.errors import UsageError
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.channels import ChannelOptions, start_incoming, start_outgoing
from rdma_mig.migration.engines import Process, Save
from rdma_mig.migration.interfaces import API_VERSION
from rdma_mig.migration.state import Migration
from rdma_mig.wire.uri import MigrationAddress, parse_uri

__all__ = [
    "ExecTransport",
    "FdTransport",
    "FileTransport",
    "RdmaTransport",
    "TcpTransport",
    "UnixTransport",
]

T = TypeVar("T")


class RdmaTransport:
    """Migrations over RDMA; its files carry hooks. Options are those of `RdmaOptions`."""

    api_version = API_VERSION
    scheme = "rdma"

    def start_incoming(
        self, uri: str, *, migration: Migration, process: Process, **options: Any
    ) -> str:
        """Listen at ``rdma:HOST:PORT``; port 0 takes a free one.

        Returns:
            the URI to connect to.

        Raises:
            UsageError, HostError, LocalProtocolError: as ``rdma_start_incoming_migration``.
        """
        from rdma_mig.migration.rdma import RdmaOptions, rdma_start_incoming_migration

        address = rdma_start_incoming_migration(
            uri,
            migration=migration,
            process=process,
            options=_options("RDMA", RdmaOptions, options),
        )
        return str(address)

    def start_outgoing(
        self, uri: str, *, migration: Migration, ram: GuestRam, save: Save, **options: Any
    ) -> None:
        """Connect to ``rdma:HOST:PORT``, and save.

        Raises:
            UsageError, HostError, LocalProtocolError: as ``rdma_start_outgoing_migration``.
        """
        from rdma_mig.migration.rdma import RdmaOptions, rdma_start_outgoing_migration

        rdma_start_outgoing_migration(
            migration, uri, ram=ram, save=save, options=_options("RDMA", RdmaOptions, options)
        )


class _PlainTransport:
    """Migrations whose pages travel in the stream; its files carry no hooks.

    Options are those of `ChannelOptions`.
    """

    api_version = API_VERSION
    scheme: ClassVar[str]

    def start_incoming(
        self, uri: str, *, migration: Migration, process: Process, **options: Any
    ) -> str:
        """Await a source, or read what there is.

        Returns:
            the URI to connect to, where one connects.

        Raises:
            UsageError, HostError, LocalProtocolError: as the header's function of the scheme.
        """
        return start_incoming(
            self._parsed(uri, listening=True),
            migration=migration,
            process=process,
            options=_options(self.scheme, ChannelOptions, options),
        )

    def start_outgoing(
        self, uri: str, *, migration: Migration, ram: GuestRam, save: Save, **options: Any
    ) -> None:
        """Connect, or open what is to be written, and save. ``ram`` needs no preparation.

        Raises:
            UsageError, HostError, LocalProtocolError: as the header's function of the scheme.
        """
        start_outgoing(
            migration,
            self._parsed(uri, listening=False),
            save=save,
            options=_options(self.scheme, ChannelOptions, options),
        )

    def _parsed(self, uri: str, *, listening: bool) -> MigrationAddress:
        if uri.partition(":")[0] != self.scheme:
            raise UsageError(f"{uri!r} is no URI of the transport {self.scheme!r}")
        return parse_uri(uri, listening=listening)


class TcpTransport(_PlainTransport):
    """Migrations over ``tcp:HOST:PORT``; to listen, port 0 takes a free one."""

    scheme = "tcp"


class UnixTransport(_PlainTransport):
    """Migrations over the socket ``unix:PATH``."""

    scheme = "unix"


class FdTransport(_PlainTransport):
    """Migrations over the inherited descriptor ``fd:NUMBER``."""

    scheme = "fd"


class ExecTransport(_PlainTransport):
    """Migrations to or from the shell command ``exec:COMMAND``."""

    scheme = "exec"


class FileTransport(_PlainTransport):
    """Migrations to or from ``file:PATH[,offset=BYTES]``."""

    scheme = "file"


def _options(transport: str, kind: Callable[..., T], options: dict[str, Any]) -> T:
    try:
        return kind(**options)
    except TypeError as error:
        raise UsageError(f"an option that {transport} does not have: {error}") from None
