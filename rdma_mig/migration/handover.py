# SPDX-License-Identifier: Apache-2.0
"""How a source hands over: device state, and the proof that it was loaded."""

from __future__ import annotations

from collections.abc import Callable

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import MigrationCancelled, MigrationError, MigrationTimeout, PeerGone
from rdma_mig.transport.outgoing import RdmaOutgoing
from rdma_mig.wire.device_state import DeviceState

__all__ = ["DestinationRefused", "hand_over"]


class DestinationRefused(MigrationError):
    """The destination said itself that it has not taken the machine."""


def hand_over(
    file: QEMUFile,
    transport: RdmaOutgoing,
    state: DeviceState,
    *,
    owner: str,
    before_last: Callable[[], None] | None = None,
) -> str:
    """Send the device state, and wait for what shows that the destination has the machine.

    Args:
        file: the stream, after the RAM section.
        transport: what it runs over.
        state: everything behind RAM.
        owner: who owns the machine if the destination has not loaded it.
        before_last: called before the bytes are sent without which nobody can take over.

    Returns:
        How success is known.

    Raises:
        MigrationError: the destination did not load it, or did not say so.
    """
    confirmed = _send(file, transport, state, owner, before_last or (lambda: None))
    if transport.final_ack:
        if state.eof_offset == len(state.raw):
            transport.send_stream_end()
        ack = transport.wait_final_ack()
        if ack.status != 0:
            raise DestinationRefused(
                f"{transport.peer} has received everything and failed to keep it: "
                f"{ack.message or 'no reason given'}",
                owner=owner,
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


def _send(
    file: QEMUFile,
    transport: RdmaOutgoing,
    state: DeviceState,
    owner: str,
    before_last: Callable[[], None],
) -> str:
    """Send it so that its borders show how far the destination came.

    A QEMU asks for more only when it has parsed what it has. So one message ends before the EOF
    byte, and the READY for that byte shows that every device was loaded; the READY for the
    description shows that the destination has left the device state for good (docs/protocol.md,
    end of stream).
    """
    raw, eof = state.raw, state.eof_offset
    piece = transport.stream_message  # a description is asked for again after each
    try:
        file.put(raw[: eof - 1])
        file.flush()
        send = transport.wait_ready("its loading all device state")
        if eof == len(raw):
            before_last()
        send(raw[eof - 1 : eof])
        confirmed = "the destination loaded all device state and asked for the end mark"
        for at in range(eof, len(raw), piece):
            send = transport.wait_ready("its leaving the device state")
            if at + piece >= len(raw):
                before_last()
            send(raw[at : at + piece])
            confirmed = "the destination loaded all device state and asked for what follows"
    except (MigrationCancelled, MigrationTimeout):
        raise
    except PeerGone as error:
        raise MigrationError(
            f"the destination did not load all device state ({error.message})",
            owner=owner,
            remedy="start it with the machine, memory and devices of the source; its own "
            "messages name what it could not load",
        ) from error
    return confirmed
