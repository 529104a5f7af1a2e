# SPDX-License-Identifier: Apache-2.0
"""RAM blocks as bytes: of a stopped QEMU, of a snapshot directory, and what differs between them.

A block is looked at from outside of the migration: main RAM through its files, every other block
through QEMU's process memory, which also shows blocks that are not mapped where the guest's
processor could see them (firmware tables, shadowed ROMs, a display's memory before it has a BAR).
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path

from harness.files import Buffer, FileBytes
from harness.guest import PAGE_SIZE
from harness.qemu import HarnessError, Qemu, RamBlockInfo

# Small enough for malloc to take it from its heap again and again: mapping and first touching a
# larger buffer each time costs ten times the work itself where page faults are slow.
_STEP = 64 << 10
# QEMU aligns what it allocates for a block to this, and puts an inaccessible page behind it.
_BLOCK_ALIGNMENT = 2 << 20
_ROM_SIGNATURE = b"\x55\xaa"
_TRIES = 3


def fill_random(path: Path, seed: int, start: int, length: int) -> None:
    """Write ``length`` pseudo-random bytes into a memory file from offset ``start`` on."""
    generator = random.Random(seed)
    with path.open("r+b") as memory:
        if start < 0 or start + length > memory.seek(0, os.SEEK_END):
            raise ValueError(f"{length} bytes from {start:#x} on do not fit into {path}")
        memory.seek(start)
        for done in range(0, length, _STEP):
            memory.write(generator.randbytes(min(_STEP, length - done)))


def fill_guest(qemu: Qemu, seed: int) -> None:
    """Write pseudo-random bytes over all RAM of a guest."""
    for number, (name, size) in enumerate(qemu.memory_sizes.items()):
        fill_random(qemu.memory_files[name], seed + number, 0, size)


def read_blocks(qemu: Qemu) -> dict[str, Buffer]:
    """Every RAM block of a stopped QEMU by name, as many bytes as are in use.

    The blocks of main RAM are live views of their files: compare before the guest runs on.

    Raises:
        HarnessError: when there is a block that cannot be told apart in QEMU's memory; none is
            left out.
    """
    for left in reversed(range(_TRIES)):
        try:
            return _read_blocks(qemu)
        except OSError as error:
            # A thread's memory is laid out as a block's may be, and goes with the thread: between
            # reading what is mapped and reading what is there.
            if error.errno != errno.EIO or not left:
                raise
    raise AssertionError("not reached")


def _read_blocks(qemu: Qemu) -> dict[str, Buffer]:
    infos = qemu.ram_blocks()
    addresses, unknown = _locate(qemu, [i for i in infos if i.name not in qemu.memory_files])
    if unknown:
        raise HarnessError(f"{qemu.name}: RAM blocks that cannot be read from outside: {unknown}")
    blocks: dict[str, Buffer] = {}
    process_memory = os.open(f"/proc/{qemu.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for info in infos:
            if path := qemu.memory_files.get(info.name):
                blocks[info.name] = FileBytes(path)
            else:
                blocks[info.name] = _read(process_memory, addresses[info.name], info)
    finally:
        os.close(process_memory)
    return blocks


def _read(process_memory: int, address: int, info: RamBlockInfo) -> bytes:
    data = os.pread(process_memory, info.used, address)
    if len(data) != info.used:
        raise HarnessError(f"only {len(data)} bytes of RAM block {info} at {address:#x}")
    return data


def _locate(
    qemu: Qemu, infos: list[RamBlockInfo]
) -> tuple[dict[str, int], dict[str, RamBlockInfo]]:
    """Host addresses of blocks, and the blocks for which there is none or a choice."""
    accessible, guards = _mappings(qemu.pid)
    firmware = qemu.hmp(f"gpa2hva {(1 << 32) - PAGE_SIZE:#x}")
    known = re.search(r"\((.+)\) is (0x[0-9a-f]+)", firmware)
    found: dict[str, int] = {}
    for info in infos:
        if known and known[1] == info.name:
            found[info.name] = int(known[2], 16) + PAGE_SIZE - info.used
    process_memory = os.open(f"/proc/{qemu.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for info in infos:
            if info.name in found:
                continue
            candidates = [
                guard - info.total
                for guard in guards
                if (guard - info.total) % _BLOCK_ALIGNMENT == 0
                and any(low <= guard - info.total and guard <= high for low, high in accessible)
                and guard - info.total not in found.values()
                and _plausible(info, os.pread(process_memory, PAGE_SIZE, guard - info.total))
            ]
            if len(candidates) == 1:
                found[info.name] = candidates[0]
    finally:
        os.close(process_memory)
    ambiguous = {n for n, a in found.items() if list(found.values()).count(a) > 1}
    return found, {i.name: i for i in infos if i.name not in found or i.name in ambiguous}


def _plausible(info: RamBlockInfo, head: bytes) -> bool:
    """Tell blocks of one size apart by what each kind has to begin with."""
    name = info.name
    if name.endswith("table-loader"):
        return head[4:9] == b"etc/a"  # its first command loads etc/acpi/...
    if name.endswith("rsdp"):
        return head[:4] == b"RSD "
    if name.endswith("acpi/tables"):
        return head[:4] == b"FACS"
    if name.endswith(".rom") and name != "pc.rom":
        return head[:2] == _ROM_SIGNATURE
    return head[:2] != _ROM_SIGNATURE and head[4:9] != b"etc/a"


def _mappings(pid: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Accessible ranges of a process, and the addresses where inaccessible ones begin.

    Two inaccessible neighbours, a block's and a thread stack's, are one range here.
    """
    accessible, guards = [], []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        extent, access = line.split()[:2]
        low, high = (int(address, 16) for address in extent.split("-"))
        # Private and not executable: main RAM is a shared file here, whose end would pass for a
        # block's, and what is executable is the translator's.
        if access == "rw-p":
            accessible.append((low, high))
        elif access.startswith("---"):
            guards.append(low)
    return accessible, guards


def snapshot_blocks(directory: Path) -> dict[str, Buffer]:
    """The RAM blocks of a snapshot directory by name, read without the code that wrote them."""
    manifest = json.loads((directory / "manifest.json").read_text())
    blocks: dict[str, Buffer] = {}
    for block in manifest["blocks"]:
        blocks[block["name"]] = data = FileBytes(directory / block["file"])
        if len(data) != block["length"]:
            raise HarnessError(f"{block['file']} has {len(data)} bytes, {block} in the manifest")
    return blocks


def differences(left: Mapping[str, Buffer], right: Mapping[str, Buffer]) -> list[str]:
    """What differs between two sets of RAM blocks, a line for each block; nothing when equal."""
    lines = [f"{name}: only on the left" for name in left if name not in right]
    lines += [f"{name}: only on the right" for name in right if name not in left]
    for name in left:
        if name not in right:
            continue
        one, other = left[name], right[name]
        if len(one) != len(other):
            lines.append(f"{name}: {len(one)} bytes on the left, {len(other)} on the right")
        elif pages := _differing_pages(one, other):
            lines.append(
                f"{name}: {len(pages)} of {-(-len(one) // PAGE_SIZE)} pages differ, "
                f"the first at {pages[0]:#x}, the last at {pages[-1]:#x}"
            )
    return lines


def _differing_pages(one: Buffer, other: Buffer) -> list[int]:
    """Offsets of the pages that differ."""
    pages = []
    for offset in range(0, len(one), _STEP):
        left, right = bytes(one[offset : offset + _STEP]), bytes(other[offset : offset + _STEP])
        if left != right:
            pages += [
                offset + at
                for at in range(0, len(left), PAGE_SIZE)
                if left[at : at + PAGE_SIZE] != right[at : at + PAGE_SIZE]
            ]
    return pages
