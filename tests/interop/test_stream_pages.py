# SPDX-License-Identifier: Apache-2.0
"""Pages in the stream against a real QEMU, through a file: what it writes, and what it reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Guest, Qemu, differences, fill_random, guest_counters, read_blocks
from support import MIB

from rdma_mig.memory import DirtyBitmap, RamBlock
from rdma_mig.memory.page_stream import PageCounters, PageReader, PageWriter, Stage, XbzrleCache
from rdma_mig.memory.ram import GuestRam
from rdma_mig.wire.stream import (
    RamStart,
    StreamHead,
    StreamParser,
    encode_eos,
    encode_footer,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)

pytestmark = pytest.mark.qemu

PAGE = 4096


class Loaded(NamedTuple):
    """A stream that was read."""

    head: StreamHead
    start: RamStart
    ram: GuestRam
    counters: PageCounters
    device_state: bytes


@contextmanager
def loaded(path: Path) -> Iterator[Loaded]:
    """Read a stream file."""
    made: list[GuestRam] = []
    readers: list[PageReader] = []

    def sink(start: RamStart) -> PageReader:
        made.append(GuestRam([RamBlock(block.idstr, block.length) for block in start.blocks]))
        readers.append(PageReader(made[0]))
        return readers[0]

    parser = StreamParser(sink)
    events = []
    try:
        with path.open("rb") as stream:
            while not parser.in_device_state:
                parser.feed(stream.read(100_001))
                while (event := parser.next_event()) is not None:
                    events.append(event)
            rest = parser.remainder() + stream.read()
        (head,) = (event for event in events if isinstance(event, StreamHead))
        (start,) = (event for event in events if isinstance(event, RamStart))
        yield Loaded(head, start, made[0], readers[0].counters, rest)
    finally:
        for ram in made:
            ram.close()


def contents(ram: GuestRam) -> dict[str, bytes]:
    blocks = {}
    for guest in ram:
        with guest.memory.view() as view:
            blocks[guest.block.idstr] = bytes(view)
    return blocks


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_what_a_qemu_writes_is_its_ram(machine: str, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with Qemu(machine=machine, guest=Guest.dirtying(4)) as qemu:
        fill_random(qemu.memory_path, 1, 32 * MIB, 8 * MIB)
        qemu.wait_heartbeat(3)
        qemu.set_parameter("max-bandwidth", 0)
        qemu.migrate(f"exec:cat > {path}")
        told = qemu.wait_migration()["ram"]
        with loaded(path) as stream:
            assert differences(read_blocks(qemu), contents(stream.ram)) == []
            assert stream.counters.normal == told["normal"] > 8 * MIB // PAGE
            assert stream.counters.duplicate == told["duplicate"] > 0
            assert stream.counters.xbzrle_pages == 0


def test_what_a_qemu_with_xbzrle_writes_is_its_ram(tmp_path: Path) -> None:
    """The guest changes four bytes of a page, which is all that is sent in later rounds."""
    path = tmp_path / "stream"
    guest = Guest.dirtying(4, pause=0)
    with Qemu(guest=guest) as qemu:
        fill_random(qemu.memory_path, 1, 16 * MIB, 16 * MIB)
        qemu.wait_heartbeat(3)
        qemu.set_capability("xbzrle")
        qemu.set_parameter("xbzrle-cache-size", 16 * MIB)
        # Slow enough for rounds to come, until there is enough of what this is about.
        qemu.set_parameter("max-bandwidth", 20 * MIB)
        qemu.set_parameter("downtime-limit", 5)
        qemu.migrate(f"exec:cat > {path}")

        def enough() -> bool:
            said = qemu.query_migrate()
            pages = said.get("xbzrle-cache", {}).get("pages", 0)
            return said["status"] == "completed" or pages > 4000

        qemu.wait("pages that XBZRLE made smaller", enough)
        qemu.set_parameter("downtime-limit", 60_000)
        told = qemu.wait_migration()
        with loaded(path) as stream:
            assert differences(read_blocks(qemu), contents(stream.ram)) == []
            guest_counters(contents(stream.ram)["pc.ram"], guest)
            assert stream.counters.normal == told["ram"]["normal"]
            assert stream.counters.duplicate == told["ram"]["duplicate"]
            # It counts the pages that it found unchanged too, which it does not send.
            assert told["xbzrle-cache"]["pages"] >= stream.counters.xbzrle_pages > 1000


def test_a_qemu_reads_what_we_write(tmp_path: Path) -> None:
    """A stream whose first round is altered, and corrected by XBZRLE: the guest goes on."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    guest = Guest.dirtying(4)
    with Qemu(guest=guest, name="source") as source:
        fill_random(source.memory_path, 1, 32 * MIB, 8 * MIB)
        heartbeat = source.wait_heartbeat(3)
        source.stop()
        source.migrate(f"exec:cat > {theirs}")
        source.wait_migration()
        blocks = {name: bytes(data[:]) for name, data in read_blocks(source).items()}
    with loaded(theirs) as stream:
        counters = write_altered(ours, stream, blocks)
    assert counters.xbzrle_pages > 1000
    assert counters.xbzrle_overflow > 50
    assert counters.xbzrle_unchanged > 50
    assert counters.xbzrle_cache_miss > 100
    uri = f"exec:cat {ours}"
    with Qemu(guest=guest, name="destination", paused=True, incoming=uri) as destination:
        destination.wait_status("paused")
        assert destination.query_migrate()["status"] == "completed"
        assert differences(blocks, read_blocks(destination)) == []
        destination.cont()
        assert destination.wait_heartbeat(3) > heartbeat


def write_altered(path: Path, stream: Loaded, blocks: dict[str, bytes]) -> PageCounters:
    """Write a stream of that machine in which RAM becomes what it is in three rounds."""
    rng = random.Random(3)
    section = stream.start.section_id
    cache = XbzrleCache(64 * MIB)
    writer = PageWriter(stream.ram, cache)
    (index,) = (guest.index for guest in stream.ram if guest.block.idstr == "pc.ram")
    right = blocks["pc.ram"]
    pages = len(right) // PAGE
    written = [page for page in range(pages) if right[page * PAGE : (page + 1) * PAGE].strip(b"\0")]
    rng.shuffle(written)
    little, late, much, same = written[:1500], written[:500], written[1500:1600], written[1600:1700]
    empty = rng.sample(sorted(set(range(pages)) - set(written)), 100)
    with path.open("wb") as out, stream.ram[index].memory.view() as ram:

        def save(dirty: DirtyBitmap | None) -> None:
            for piece in writer.pieces(index, dirty):
                out.write(piece)

        def correct(numbers: list[int]) -> DirtyBitmap:
            for page in numbers:
                ram[page * PAGE : (page + 1) * PAGE] = right[page * PAGE : (page + 1) * PAGE]
            return dirty_of(pages, numbers)

        out.write(stream.head.raw + encode_ram_start(section, stream.start.blocks))
        out.write(encode_eos() + encode_footer(section) + encode_section_part(section))
        for guest in stream.ram:
            if guest.index != index:
                for piece in writer.pieces(guest.index):
                    out.write(piece)
        for page in [*much, *empty]:
            ram[page * PAGE : (page + 1) * PAGE] = rng.randbytes(PAGE)
        for page in little:
            for _ in range(rng.randrange(1, 9)):
                ram[page * PAGE + rng.randrange(PAGE)] = rng.randrange(256)
        save(None)
        out.write(encode_eos() + encode_footer(section) + encode_section_part(section))
        # The cache learns the altered pages, then what is right is sent against them.
        cache.age, writer.stage = 1, Stage.ROUND
        save(dirty_of(pages, [*little, *much, *same, *empty]))
        cache.age = 2
        early = sorted(set(little) - set(late))
        save(correct([*early, *much, *same, *empty]))
        out.write(encode_eos() + encode_footer(section) + encode_section_end(section))
        writer.stage = Stage.LAST
        save(correct(late))
        out.write(encode_eos() + encode_footer(section) + stream.device_state)
    return writer.counters


def dirty_of(pages: int, numbers: list[int]) -> DirtyBitmap:
    dirty = DirtyBitmap(pages)
    for page in numbers:
        dirty.set(page)
    return dirty
