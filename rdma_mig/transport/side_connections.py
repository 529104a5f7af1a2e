# SPDX-License-Identifier: Apache-2.0
"""Connections beside the first, over which RAM is written too.

For hardware that one queue pair cannot fill. Between our own ends only: they are agreed on in the
extension block, opened before the first byte of the stream, and belong to the first connection by
its nonce and its address (docs/protocol.md, several connections).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rdma_mig.errors import HostError, MigrationTimeout, PeerGone
from rdma_mig.transport.control import ControlChannel
from rdma_mig.verbs.connector import connect
from rdma_mig.verbs.endpoint import Endpoint, EndpointOptions
from rdma_mig.waits import Cancel, TransportLimits
from rdma_mig.wire.control import ControlMessage, ControlType
from rdma_mig.wire.handshake import MAX_CONNECTIONS, PrivateData

__all__ = ["SideConnections", "granted_beside", "open_side_connections", "side_options"]

# Nothing comes here but the end of a phase, without payload.
_SLOTS = 2
_SLOT_SIZE = 4096


def granted_beside(asked: PrivateData) -> int:
    """Return how many connections beside the first a source gets that has asked so."""
    return min(asked.extension.beside, MAX_CONNECTIONS - 1) if asked.extension else 0


def side_options(options: EndpointOptions) -> EndpointOptions:
    """Return the options of a connection beside the first one, which has these."""
    return replace(options, slots=_SLOTS, slot_size=_SLOT_SIZE)


class SideConnections:
    """All connections beside the first, at either end.

    Reads and writes on different connections have no order. So the end of each phase is a message
    on each: what was written over a connection before it is in place when it arrives. It needs no
    READY, since the one before was taken when the phase before ended, and a receive is posted.

    Args:
        endpoints: by number, from 1; closed with the first connection at the latest.
        limits: on the waits.
    """

    def __init__(self, endpoints: Sequence[Endpoint], limits: TransportLimits) -> None:
        self.endpoints = tuple(endpoints)
        self._channels = [
            ControlChannel(endpoint, limits, f"connection-{number}")
            for number, endpoint in enumerate(self.endpoints, 1)
        ]

    def end_phase(self) -> None:
        """Tell the destination, on each, that the phase has ended: all its writes have completed.

        Raises:
            PeerGone, MigrationTimeout, MigrationCancelled: it cannot be told.
        """
        for channel in self._channels:
            channel.post(ControlMessage(ControlType.REGISTER_FINISHED))

    def await_phase_end(self) -> None:
        """Wait until the source has said so on each.

        Raises:
            RemoteProtocolError: it said something else.
            PeerGone, MigrationTimeout, MigrationCancelled: it said nothing.
        """
        for number, channel in enumerate(self._channels, 1):
            channel.await_message(
                ControlType.REGISTER_FINISHED, f"the end of the RAM phase on connection {number}"
            )


def open_side_connections(
    first: Endpoint,
    port: int,
    asked: PrivateData,
    cancel: Cancel,
    options: EndpointOptions,
) -> list[Endpoint]:
    """Open as many as were asked for and granted, and return them; closed with the first one.

    Args:
        first: the connection, whose reply has come.
        port: that the destination listens at.
        asked: private data of the first request.
        cancel: ends the wait.
        options: those of the first connection.

    Raises:
        PeerGone, HostError, MigrationTimeout: one of them did not come about.
        MigrationCancelled: it was asked for.
    """
    granted = PrivateData.decode(first.private_data)
    if asked.extension is None or granted.extension is None:
        return []
    found: list[Endpoint] = []
    for number in range(1, min(asked.extension.beside, granted.extension.beside) + 1):
        request = replace(asked, extension=replace(asked.extension, number=number))
        try:
            # To the very address that took the first one: a name may lead elsewhere by now.
            endpoint = connect(
                first.peer_host, port, request.encode(), cancel, side_options(options), first
            )
        except (PeerGone, HostError, MigrationTimeout) as error:
            error.message = f"connection {number} beside the first failed: {error.message}"
            error.remedy = error.remedy or "migrate with --connections 1"
            raise
        endpoint.follow(first)
        found.append(endpoint)
    return found
