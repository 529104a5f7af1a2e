# SPDX-License-Identifier: Apache-2.0
"""Page records of the stream, read and written."""

import os
import random
import struct

import pytest

from rdma_mig.errors import RemoteProtocolError
from rdma_mig.memory import DirtyBitmap, RamBlock
from rdma_mig.memory.page_stream import PIECE_SIZE, PageCounters, PageReader, PageWriter
from rdma_mig.memory.ram import GuestRam
from rdma_mig.wire.stream import (
    StreamBlock,
    StreamParser,
    encode_footer,
    encode_head,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)

PAGE = 4096
ZERO, FULL, MEM_SIZE, DATA, EOS, CONTINUE, XBZRLE, HOOK, COMPRESS = (
    0x02, 0x01, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x100,
)  # fmt: skip
END = struct.pack(">Q", EOS)
PIECES = 3 * PIECE_SIZE // PAGE


def record(flags, offset=0, payload=b"", name=None):
    """One page record, as docs/protocol.md describes it."""
    named = b"" if flags & CONTINUE else struct.pack("B", len(name)) + name
    return struct.pack(">Q", offset | flags) + named + payload


def zero(offset, name=None, fill=0):
    return record(ZERO | (0 if name else CONTINUE), offset, bytes([fill]), name)


def page(offset, data, name=None):
    return record(DATA | (0 if name else CONTINUE), offset, data, name)


def xbzrle(offset, encoded, name=None, encoding=1, size=None):
    head = struct.pack(">BH", encoding, len(encoded) if size is None else size)
    return record(XBZRLE | (0 if name else CONTINUE), offset, head + encoded, name)


def noise(pages, seed=0):
    return random.Random(seed).randbytes(pages * PAGE)


@pytest.fixture
def ram():
    with GuestRam([RamBlock("pc.ram", 64 * PAGE), RamBlock("pc.bios", 4 * PAGE)]) as guest:
        yield guest


def contents(ram, index=0):
    with ram[index].memory.view() as view:
        return bytes(view)


def fill(ram, index, offset, data):
    with ram[index].memory.view() as view:
        view[offset : offset + len(data)] = data


def allocated(ram, index=0):
    """Pages of a block that have memory."""
    return os.fstat(ram[index].memory.fd).st_blocks * 512 // PAGE


def stream():
    """Records of every kind over both blocks, and what RAM is after them."""
    old, data = noise(3), noise(8, 1)
    patched = bytearray(data[:PAGE])
    patched[5:7] = b"\xaa\xbb"
    data_of_bios = data[PAGE : 2 * PAGE]
    parts = [
        page(0, data[:PAGE], b"pc.ram"),
        zero(PAGE),
        zero(3 * PAGE),
        page(0, data_of_bios, b"pc.bios"),
        page(PAGE, old[:PAGE]),
        zero(PAGE),
        xbzrle(0, b"\x05\x02\xaa\xbb", b"pc.ram"),
        zero(9 * PAGE, fill=0x5A),
        page(63 * PAGE, data[2 * PAGE : 3 * PAGE]),
    ]
    main = bytes(patched) + bytes(8 * PAGE) + b"\x5a" * PAGE + bytes(53 * PAGE)
    return parts, main + data[2 * PAGE : 3 * PAGE], data_of_bios + bytes(3 * PAGE)


def test_records_of_every_kind_at_once(ram):
    parts, main, bios = stream()
    fill(ram, 0, 3 * PAGE, b"old")
    data = b"##" + b"".join(parts)
    reader = PageReader(ram)
    assert reader.load(data + END, 2) == len(data)
    assert contents(ram) == main
    assert contents(ram, 1) == bios
    counted = PageCounters(normal=4, duplicate=4, xbzrle_pages=1, xbzrle_bytes=len(parts[6]))
    assert reader.counters == counted


def test_records_that_are_cut_anywhere(ram):
    """Given byte by byte, records are taken one by one, each when it is whole."""
    parts, main, bios = stream()
    fill(ram, 0, 3 * PAGE, b"old")
    reader = PageReader(ram)
    ends = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + len(part))
    data, at, stops = b"".join(parts), 0, []
    steps = {end + near for end in [0, *ends] for near in range(-20, 21)} | set(
        range(0, len(data), 97)
    )
    for end in sorted(step for step in steps if 0 <= step <= len(data)):
        before, at = at, reader.load(data[:end], at)
        if at > before:
            stops.append(at)
            assert at == end
    assert stops == ends
    assert contents(ram) == main
    assert contents(ram, 1) == bios


@pytest.mark.parametrize("word", [EOS, HOOK, MEM_SIZE, FULL, 0x200, 0, 123 << 12])
def test_other_words_are_left_to_the_parser(ram, word):
    assert PageReader(ram).load(struct.pack(">Q", word) + bytes(99)) == 0


def test_nothing_is_nothing(ram):
    assert PageReader(ram).load(b"") == 0
    assert PageReader(ram).load(b"1234567", 7) == 7
    with pytest.raises(IndexError):
        PageReader(ram).load(b"1234567", 8)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (zero(0), "does not name its RAM block"),
        (zero(0, b"pc.rom"), "RAM block 'pc.rom' came, which was not listed"),
        (zero(0, b"\xff\n"), r"block '\\\\xff\\n' came"),
        (record(ZERO, 0, b"\0", b""), "RAM block '' came"),
        (zero(64 * PAGE, b"pc.ram"), "offset 0x40000, it has 0x40000 bytes"),
        (page(64 * PAGE, noise(1), b"pc.ram"), "offset 0x40000"),
        (page(4 * PAGE, noise(1), b"pc.bios"), "offset 0x4000, it has 0x4000 bytes"),
        (zero(0xFFFFFFFFFFFFF000, b"pc.ram"), "offset 0xfffffffffffff000"),
        (xbzrle(64 * PAGE, b"\0\1a", b"pc.ram"), "offset 0x40000"),
        (record(COMPRESS, 0, b"", b"pc.ram"), "COMPRESS_PAGE.*compress off at the source"),
        (record(CONTINUE), "allowed with a page are"),
        (record(ZERO | DATA, 0, b"", b"pc.ram"), "allowed with a page are"),
        (record(DATA | HOOK, 0, b"", b"pc.ram"), "allowed with a page are"),
        (record(DATA | 0x800, 0, b"", b"pc.ram"), "allowed with a page are"),
        (xbzrle(0, b"\0\1a", b"pc.ram", encoding=2), "another encoding than 1"),
        (xbzrle(0, b"", b"pc.ram", size=4097), "more than 4096 encoded"),
        (xbzrle(0, b"\0\1", b"pc.ram"), "XBZRLE page is broken"),
        # Its first run is right.
        (xbzrle(0, b"\0\1a\5", b"pc.ram"), "XBZRLE page is broken"),
    ],
)
def test_records_that_are_refused(ram, bad, match):
    good = page(0, noise(1), b"pc.bios") if bad[7] & CONTINUE == 0 else b""
    data = b"?" + good + bad
    with pytest.raises(RemoteProtocolError, match=match) as caught:
        PageReader(ram).load(data + bytes(2 * PAGE), 1)
    assert caught.value.at == 1 + len(good)
    assert not any(contents(ram)), "nothing was written by it"


def test_zero_pages_allocate_nothing_and_free_what_was_there(ram):
    fill(ram, 0, 10 * PAGE, noise(2))
    records = [zero(0, b"pc.ram"), *(zero(at * PAGE) for at in range(1, 64))]
    for order in (records, records[:1] + records[:0:-1]):
        fill(ram, 0, 10 * PAGE, noise(2))
        assert PageReader(ram).load(b"".join(order)) == sum(map(len, records))
        assert not any(bytes(contents_without_touching(ram)))
        assert allocated(ram) == 2


def contents_without_touching(ram):
    return os.pread(ram[0].memory.fd, 64 * PAGE, 0)


def test_a_block_is_written_and_read(ram):
    data = noise(20) + bytes(10 * PAGE) + noise(3, 5) + bytes(31 * PAGE)
    fill(ram, 0, 0, data[: 33 * PAGE])
    writer = PageWriter(ram)
    before = allocated(ram)
    (piece,) = (bytes(piece) for piece in writer.pieces(0))
    assert allocated(ram) == before, "what was never written is not touched"
    assert piece[:15] == record(DATA, 0, b"", b"pc.ram")
    assert piece[15 + PAGE : 23 + PAGE] == struct.pack(">Q", PAGE | DATA | CONTINUE)
    assert len(piece) == 64 * 8 + 7 + 23 * PAGE + 41
    assert (writer.counters.normal, writer.counters.duplicate) == (23, 41)
    with GuestRam([guest.block for guest in ram]) as copy:
        assert PageReader(copy).load(piece) == len(piece)
        assert allocated(copy) == 23
        assert contents(copy) == data


def test_only_dirty_pages_are_written(ram):
    fill(ram, 0, 0, noise(64))
    dirty = DirtyBitmap(64)
    writer = PageWriter(ram)
    assert list(writer.pieces(0, dirty)) == []
    dirty.set(7)
    dirty.set(63)
    (piece,) = (bytes(piece) for piece in writer.pieces(0, dirty))
    data = contents(ram)
    assert piece == page(7 * PAGE, data[7 * PAGE : 8 * PAGE], b"pc.ram") + page(
        63 * PAGE, data[63 * PAGE :]
    )
    assert dirty.count() == 2


def test_pieces_are_cut_at_records_and_each_names_its_block():
    with GuestRam([RamBlock("a", PIECES * PAGE)]) as ram, GuestRam([ram[0].block]) as copy:
        fill(ram, 0, 0, noise(PIECES))
        sizes = []
        for piece in PageWriter(ram).pieces(0):
            # Any of them can be the first that a reader sees.
            assert PageReader(copy).load(piece) == len(piece)
            sizes.append(len(piece))
        assert len(sizes) == 4
        assert PIECE_SIZE - 9 - PAGE < sizes[0] <= PIECE_SIZE
        assert contents(ram) == contents(copy)


def test_memory_can_be_closed_between_pieces():
    ram = GuestRam([RamBlock("a", PIECES * PAGE)])
    fill(ram, 0, 0, noise(PIECES))
    pieces = PageWriter(ram).pieces(0)
    next(pieces)
    ram.close()
    with pytest.raises(ValueError, match="closed"):
        next(pieces)


HEAD = encode_head("pc-q35-7.2")
START = encode_ram_start(2, [StreamBlock("pc.ram", 64 * PAGE), StreamBlock("pc.bios", 4 * PAGE)])


def parse(data, step, made):
    """Feed *data* in pieces of *step* bytes; return events and RAM, which is added to *made*."""

    def sink(start):
        made.append(GuestRam([RamBlock(block.idstr, block.length) for block in start.blocks]))
        return PageReader(made[0])

    parser = StreamParser(sink)
    events, most = [], 0
    for at in range(0, len(data), step):
        parser.feed(data[at : at + step])
        while (event := parser.next_event()) is not None:
            events.append(event)
        most = max(most, parser.buffered)
    assert most <= step + len(record(DATA, 0, bytes(PAGE), b"pc.bios"))
    return events, made[0]


@pytest.mark.parametrize("step", [1, 4099, 1 << 20])
def test_pages_in_a_whole_stream(step):
    parts, main, bios = stream()
    rounds = [START, b"".join(parts[:4]), END, encode_footer(2), encode_section_part(2)]
    rounds += [b"".join(parts[4:7]), END, encode_footer(2), encode_section_end(2)]
    rounds += [b"".join(parts[7:]), END, encode_footer(2)]
    made = []
    try:
        events, ram = parse(HEAD + b"".join(rounds), step, made)
        assert contents(ram) == main
        assert contents(ram, 1) == bios
        assert len(made) == 1, "one sink for all rounds"
        assert [type(event).__name__ for event in events] == [
            "StreamHead", "RamStart", "SectionEnd", "RamPart", "SectionEnd", "RamEnd", "SectionEnd",
        ]  # fmt: skip
    finally:
        made[0].close()


@pytest.mark.parametrize("step", [1, 5000, 1 << 20])
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (zero(64 * PAGE), "offset 0x40000"),
        (struct.pack(">Q", MEM_SIZE), r"word 0x4, allowed are pages, HOOK \(0x80\) and EOS"),
        (struct.pack(">Q", 0x200), "word 0x200, .*multifd off"),
    ],
)
def test_errors_tell_the_byte_of_the_stream(step, bad, match):
    made = []
    good = HEAD + START + page(0, noise(1), b"pc.ram")
    try:
        with pytest.raises(RemoteProtocolError, match=match) as caught:
            parse(good + bad + bytes(PAGE), step, made)
        assert caught.value.at == len(good)
        assert f"(byte {len(good)} of the stream)" in str(caught.value)
    finally:
        made[0].close()
