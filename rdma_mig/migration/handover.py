# SPDX-License-Identifier: Apache-2.0
"""How a source hands over: device state, and the proof that it was loaded."""

from __future__ import annotations

from collections.abc import Callable

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import SourceTransport
from rdma_mig.errors import MigrationCancelled, MigrationError, MigrationTimeout, PeerGone
from rdma_mig.migration.state import Migration
from rdma_mig.wire.device_state import DeviceState

__all__ = ["DestinationRefused", "hand_over"]


class DestinationRefused(MigrationError):
    """The destination said itself that it has not taken the machine."""


def hand_over(
    migration: Migration,
    file: QEMUFile,
    transport: SourceTransport,
    state: DeviceState,
    *,
    owner: str,
    before_eof: Callable[[], None] | None = None,
) -> str:
    """Send the device state, and wait for what shows that the destination has the machine.

    Args:
        migration: whose step and trace follow.
        file: the stream, after the RAM section.
        transport: what it runs over.
        state: everything behind RAM.
        owner: who owns the machine if the destination has not loaded it.
        before_eof: called before the EOF byte is sent, without which nobody can take over.

    Returns:
        How success is known.

    Raises:
        MigrationError: the destination did not load it, or did not say so.
    """

    def commit() -> None:
        migration.note_commit("source", "EOF", "before")
        if before_eof is not None:
            before_eof()

    migration.state.step = "sending device state"
    try:
        confirmed = transport.send_device_state(file, state.raw, state.eof_offset, commit)
    except (MigrationCancelled, MigrationTimeout):
        raise
    except PeerGone as error:
        raise MigrationError(
            f"the destination did not load all device state ({error.message})",
            owner=owner,
            remedy="start it with the machine, memory and devices of the source; its own "
            "messages name what it could not load",
        ) from error
    migration.state.step = "waiting for the destination's last word"
    if transport.final_ack:
        if state.eof_offset == len(state.raw):
            transport.send_stream_end()
        ack = transport.wait_final_ack()
        if ack.status != 0:
            raise DestinationRefused(
                f"{transport.peer} has received everything and failed to keep it: "
                f"{ack.message or 'no reason given'}",
                owner=owner,
                remedy="mend that there, and send it again",
            )
        confirmed = "the destination acknowledged that RAM and device state are on disk"
    if transport.has_return_path:
        status = transport.wait_shut()
        if status != 0:
            raise DestinationRefused(
                f"{transport.peer} says on the return path that it failed (status {status})",
                owner=owner,
                remedy="its own messages say why",
            )
        if not transport.final_ack:
            confirmed = "the destination said on the return path that it has loaded everything"
    return confirmed
