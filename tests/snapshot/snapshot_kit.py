# SPDX-License-Identifier: Apache-2.0
"""Small guests to keep, and how to keep them, for the tests of snapshots."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.snapshot import SnapshotWriter, StreamFacts

MIB = 1 << 20
HEAD = b"QEVM\0\0\0\3\x07\0\0\0\x0apc-q35-7.2"
DESCRIPTION = (
    b'{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", '
    b'"version": 2, "fields": []}, {"name": "0000:00:02.0/e1000e", "instance_id": 1}]}'
)
STATE = b"\x04 devices \0"
BLOCKS = (
    RamBlock("pc.ram", 5 * MIB + 4096),
    RamBlock("/rom@etc/acpi/tables", 100_000, page_size=4096),
    RamBlock("pc.rom", 3 * MIB, guest_address=0xC0000),
)


def noise(size: int, seed: int = 1) -> bytes:
    """Random bytes, the same each time."""
    return random.Random(seed).randbytes(size)


def child_environment() -> dict[str, str]:
    """The environment for a Python child that imports this module."""
    more = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, more))}


def paint(memories: list[GuestMemory]) -> None:
    """Data here and there: whole chunks, single bytes, the last byte, nothing at all."""
    with memories[0].view() as view:
        view[:MIB] = noise(MIB)
        view[2 * MIB + 4095] = 1
        view[3 * MIB - 1] = 2
        view[-1] = 3
    with memories[1].view() as view:
        view[:] = noise(len(view), 2)


@contextlib.contextmanager
def guest(blocks: tuple[RamBlock, ...] = BLOCKS) -> Iterator[list[GuestMemory]]:
    """Painted memory for the blocks."""
    with contextlib.ExitStack() as stack:
        memories = [stack.enter_context(GuestMemory(b.length, b.idstr)) for b in blocks]
        if blocks is BLOCKS:
            paint(memories)
        yield memories


def fill(writer, memories, blocks=BLOCKS, *, description=DESCRIPTION, device_state=MIB):
    """Everything but the commit."""
    writer.write_config(HEAD)
    writer.reserve(list(zip(blocks, memories, strict=True)), device_state)
    writer.append_device_state(STATE)
    if description is not None:
        frame = b"\x06" + len(description).to_bytes(4, "big") + description
        writer.append_device_state(frame[:9])
        writer.append_device_state(memoryview(frame)[9:])
        writer.set_description(description)
    for index in range(len(blocks)):
        writer.write_ram(index)


FACTS = StreamFacts("pc-q35-7.2", ram_section_id=2, footers=True)


def commit(writer, facts=FACTS, **more) -> Path:
    return writer.commit(facts, eof_offset=len(STATE), **more)


def keep(path, memories, blocks=BLOCKS, **more) -> Path:
    """A whole snapshot."""
    with SnapshotWriter(path) as writer:
        fill(writer, memories, blocks, **more)
        return commit(writer)
