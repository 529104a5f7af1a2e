# SPDX-License-Identifier: Apache-2.0
"""A migration of a little memory that belongs to no machine: does the path carry bytes?

It takes the road of a machine: handshake, registration, RDMA writes, acknowledgement. The
destination answers with a digest of what arrived.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.memory import RamBlock
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_BLOCK_REG,
    RAM_CONTROL_FINISH,
    RAM_CONTROL_HOOK,
    RAM_CONTROL_SETUP,
    ram_control_after_iterate,
    ram_control_before_iterate,
    ram_control_load_hook,
    ram_control_save_pages,
)
from rdma_mig.wire.control import FinalAck
from rdma_mig.wire.stream import (
    Hook,
    RamStart,
    StreamBlock,
    StreamParser,
    encode_eos,
    encode_footer,
    encode_head,
    encode_ram_start,
    encode_section_end,
)

if TYPE_CHECKING:
    from rdma_mig.channel.qemufile import QEMUFile
    from rdma_mig.migration.state import Migration
    from rdma_mig.transport.incoming import RdmaIncoming
    from rdma_mig.transport.outgoing import RdmaOutgoing

__all__ = ["SAMPLE_SIZE", "Sample", "receive_sample"]

SAMPLE_SIZE = 16 << 20
"""Bytes that are moved where nothing else is said."""

# No machine of QEMU's has such a name, so that nobody takes it for one.
_MACHINE = "rdma-mig-path-check"
_SECTION = 2
_DISCONNECT_SECONDS = 5.0


@dataclass(slots=True)
class Sample:
    """The source's end; ``save`` is its engine function.

    Attributes:
        ram: random bytes; its owner closes it after the migration.
        setup_seconds: populating and registering at both ends.
        transfer_seconds: the writes, up to the end of their phase.
    """

    ram: GuestRam
    setup_seconds: float = 0.0
    transfer_seconds: float = 0.0

    @classmethod
    def make(cls, size: int = SAMPLE_SIZE) -> Sample:
        """Fill ``size`` bytes, a multiple of 16 MiB, with random ones."""
        ram = GuestRam([RamBlock("sample", size)])
        with ram[0].memory.view() as view:
            for at in range(0, size, SAMPLE_SIZE):
                view[at : at + SAMPLE_SIZE] = os.urandom(SAMPLE_SIZE)
        return cls(ram)

    def save(self, migration: Migration, file: QEMUFile, transport: RdmaOutgoing) -> None:
        """Move it, and compare what arrived.

        Raises:
            RemoteProtocolError: the other end is none of ours, or has something else in its memory.
        """
        if not transport.final_ack:
            raise RemoteProtocolError(f"{transport.peer} is no rdma-migrate doctor --serve")
        end_of_phase = encode_eos() + encode_footer(_SECTION)
        file.put(encode_head(_MACHINE))
        file.put(encode_ram_start(_SECTION, [StreamBlock("sample", self.ram.total)]))
        ram_control_before_iterate(file, RAM_CONTROL_SETUP)
        ram_control_after_iterate(file, RAM_CONTROL_SETUP)
        self.setup_seconds = transport.setup_seconds
        began = time.monotonic()
        file.put(end_of_phase + encode_section_end(_SECTION))
        ram_control_before_iterate(file, RAM_CONTROL_FINISH)
        ram_control_save_pages(file, self.ram[0].offset)
        ram_control_after_iterate(file, RAM_CONTROL_FINISH)
        self.transfer_seconds = time.monotonic() - began
        file.put(end_of_phase)
        file.flush()
        transport.send_stream_end()
        answer = transport.wait_final_ack()
        with self.ram[0].memory.view() as view:
            ours = hashlib.sha256(view).hexdigest()
        if answer.message != ours:
            raise RemoteProtocolError(f"{transport.peer} has received other bytes than were sent")
        transport.finish()


def receive_sample(
    migration: Migration, file: QEMUFile, transport: RdmaIncoming, size: int = SAMPLE_SIZE
) -> None:
    """Be the destination's engine function for a sample: take it, and answer with its digest.

    Args:
        migration, file, transport: as an engine gets them.
        size: bytes that were agreed on.

    Raises:
        RemoteProtocolError: something else than a sample came.
    """
    parser = StreamParser()
    ram: GuestRam | None = None
    try:
        while not parser.in_device_state:
            event = parser.next_event()
            if event is None:
                data = file.get()
                if not data:
                    raise RemoteProtocolError(f"{transport.peer} ended the stream early")
                parser.feed(data)
            elif isinstance(event, RamStart):
                if event.total != size or len(event.blocks) != 1:
                    raise RemoteProtocolError(
                        f"{transport.peer} wants to send a machine, and this end only "
                        "checks the path"
                    )
                ram = GuestRam([RamBlock(event.blocks[0].idstr, event.total)])
                ram_control_load_hook(file, RAM_CONTROL_BLOCK_REG, event.blocks[0].idstr)
                transport.attach(ram)
            elif isinstance(event, Hook):
                ram_control_load_hook(file, RAM_CONTROL_HOOK)
        if ram is None:
            raise LocalProtocolError("a RAM section ended that did not begin")
        transport.withdraw_keys()
        with ram[0].memory.view() as view:
            digest = hashlib.sha256(view).hexdigest()
        file.get()
        transport.acknowledge(FinalAck(0, digest))
        transport.wait_disconnected(_DISCONNECT_SECONDS)
    finally:
        # Regions hold the memory: they go first.
        transport.close()
        if ram is not None:
            ram.close()
