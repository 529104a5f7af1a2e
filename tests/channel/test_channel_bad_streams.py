# SPDX-License-Identifier: Apache-2.0
"""Streams that are cut, flipped or lie: one failure that says where, and no snapshot."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from rdma_mig.errors import MigrationError, ProtocolError
from rdma_mig.memory.blocks import RamBlock
from rdma_mig.memory.page_stream import PageWriter
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.channels import start_incoming
from rdma_mig.migration.receive import SnapshotDestination
from rdma_mig.migration.state import Migration
from rdma_mig.snapshot import Snapshot
from rdma_mig.wire.stream import (
    StreamBlock,
    encode_eos,
    encode_footer,
    encode_head,
    encode_ram_start,
    encode_section_end,
)
from rdma_mig.wire.uri import FileAddress

BLOCKS = (("pc.ram", 64 << 10), ("vga", 8 << 10))
DEVICE = b"\x04" + struct.pack(">I", 3) + b"\x03cpu" + bytes(8) + bytes(range(1, 200))
DESCRIPTION = b'{"page_size": 4096, "devices": []}'


def pages(blocks: tuple[tuple[str, int], ...] = BLOCKS) -> bytes:
    with GuestRam([RamBlock(name, length, None, None) for name, length in blocks]) as ram:
        for guest in ram:
            with guest.memory.view() as view:
                view[: len(view) // 2] = random.Random(guest.index).randbytes(len(view) // 2)
        writer = PageWriter(ram)
        return b"".join(bytes(piece) for guest in ram for piece in writer.pieces(guest.index))


def start(listed: tuple[tuple[str, int], ...]) -> bytes:
    """The RAM section's begin; by hand, since ours would refuse to say some of it."""
    names = b"".join(
        bytes([len(name)]) + name.encode() + struct.pack(">Q", length) for name, length in listed
    )
    total = sum(length for _, length in listed)
    head = encode_ram_start(2, [StreamBlock("x", 4096)])[: -(8 + 2 + 8)]
    return head + struct.pack(">Q", total | 4) + names


def pieces(listed: tuple[tuple[str, int], ...] = BLOCKS, sent: bytes | None = None) -> list[bytes]:
    """The parts of a whole stream, cut at the borders of its sections."""
    return [
        encode_head("pc-i440fx-7.2"),
        start(listed),
        encode_eos() + encode_footer(2),
        encode_section_end(2),
        pages() if sent is None else sent,
        encode_eos() + encode_footer(2),
        DEVICE + encode_footer(3),
        b"\0",
        b"\x06" + struct.pack(">I", len(DESCRIPTION)) + DESCRIPTION,
    ]


WHOLE = b"".join(pieces())


def receive(room: Path, stream: bytes) -> Path:
    """Receive a stream from a file; return the snapshot's directory, or raise."""
    source = room / "stream"
    source.write_bytes(stream)
    destination = SnapshotDestination(room / "kept")
    try:
        with Migration() as migration:
            start_incoming(
                FileAddress(str(source)), migration=migration, process=destination.process
            )
            migration.wait()
    finally:
        destination.close()
    return room / "kept"


def attempt(room: Path, stream: bytes) -> tuple[Path | None, MigrationError | None]:
    try:
        return receive(room, stream), None
    except MigrationError as error:
        return None, error


def assert_refused(room: Path, stream: bytes, *said: str) -> MigrationError:
    with pytest.raises(MigrationError) as refused:
        receive(room, stream)
    assert [path.name for path in room.iterdir()] == ["stream"]
    assert "unexpected" not in str(refused.value)
    assert "unchanged" in refused.value.owner
    for text in said:
        assert text in str(refused.value)
    return refused.value


def test_whole_stream_is_a_snapshot(tmp_path: Path):
    with Snapshot.open(receive(tmp_path, WHOLE)) as snapshot:
        snapshot.verify()
        assert [(b.idstr, b.length) for b in snapshot.blocks] == list(BLOCKS)


@pytest.mark.parametrize("cuts", [150, pytest.param(2000, marks=pytest.mark.full)])
def test_stream_that_is_cut_is_refused_wherever_that_is(tmp_path: Path, cuts: int):
    borders = [sum(map(len, pieces()[:count])) for count in range(len(pieces()))]
    anywhere = random.Random(1).sample(range(len(WHOLE)), cuts)
    for at in {*borders, *anywhere, len(WHOLE) - 1}:
        assert_refused(tmp_path, WHOLE[:at])


def test_bytes_behind_the_end_are_refused(tmp_path: Path):
    assert_refused(tmp_path, WHOLE + b"\0")


def test_bits_that_are_flipped_end_in_a_snapshot_or_in_one_failure(tmp_path: Path):
    """A bit of a page's bytes is not to be noticed; one of the stream's own must not be harm."""
    chance = random.Random(2)
    head = sum(map(len, pieces()[:4]))
    refused = 0
    for count in range(100):
        room = tmp_path / str(count)
        room.mkdir()
        stream = bytearray(WHOLE)
        at = chance.randrange(head if count % 2 else len(stream))
        stream[at] ^= 1 << chance.randrange(8)
        kept, error = attempt(room, bytes(stream))
        if kept is None:
            assert "unexpected" not in str(error)
            assert [path.name for path in room.iterdir()] == ["stream"]
            refused += 1
        else:
            with Snapshot.open(kept) as snapshot:
                snapshot.verify()
    assert refused > 20


def test_size_that_lies_allocates_nothing(tmp_path: Path):
    tracemalloc.start()
    try:
        assert_refused(tmp_path, b"".join(pieces(listed=(("pc.ram", 1 << 60),))), "MiB available")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (pieces(listed=(("pc.ram", 4096), ("pc.ram", 4096))), "listed twice"),
        (pieces(listed=(("pc.ram", 64 << 10),)), "'vga' came, which was not listed"),
        (pieces(sent=b""), "sent 0 of 18 pages"),
        (pieces(sent=struct.pack(">Q", 0x28) + bytes(4096)), "does not name its RAM block"),
        (pieces(sent=struct.pack(">Q", 1 << 20 | 8) + b"\x06pc.ram" + bytes(4096)), "0x100000"),
        (
            pieces(sent=struct.pack(">Q", 0x40) + b"\x06pc.ram\x01\x00\x03\xff\x7f\x00"),
            "XBZRLE page is broken",
        ),
        (pieces(sent=struct.pack(">Q", 0x80)), "does not run over RDMA"),
        ([b"QEVM" + struct.pack(">I", 2)], "version is 2"),
        ([b"QEVM" + struct.pack(">I", 3) + b"\x04" + bytes(4) + b"\x05block"], "machine"),
    ],
)
def test_what_has_no_place_is_named(tmp_path: Path, stream: list[bytes], said: str):
    error = assert_refused(tmp_path, b"".join(stream), said)
    assert isinstance(error, ProtocolError)
