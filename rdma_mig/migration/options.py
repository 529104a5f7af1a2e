# SPDX-License-Identifier: Apache-2.0
"""What can be said of a migration over any channel: apart, since RDMA needs no more of them."""

from __future__ import annotations

from dataclasses import dataclass

from rdma_mig.waits import TransportLimits

__all__ = ["ChannelOptions"]


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """Options of a migration over a plain channel.

    Attributes:
        return_path: let the destination say on the same socket how it ended; None for where there
            is a socket. Outgoing only, since a destination takes what the source opens.
        total_seconds: limit on the whole migration; None for none.
        stall_seconds: how long a peer may say or take nothing; None for ever.
        allow: networks that a source may come from, over TCP; none for everywhere. Incoming only.
        accept_seconds: limit on the wait for a source; None for none.
    """

    return_path: bool | None = None
    total_seconds: float | None = None
    stall_seconds: float | None = None
    allow: tuple[str, ...] = ()
    accept_seconds: float | None = None

    def limits(self) -> TransportLimits:
        """Make the limits of a migration that begins now."""
        return TransportLimits(self.total_seconds, self.stall_seconds)
