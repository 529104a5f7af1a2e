# SPDX-License-Identifier: Apache-2.0
"""XBZRLE against the plainest Python that does the same, and the cache of the writer."""

import itertools
import random
import threading
import time

import pytest
import writer_kit
from hypothesis import given, settings
from hypothesis import strategies as st

from rdma_mig import _stream
from rdma_mig.errors import HostError
from rdma_mig.memory import DirtyBitmap, RamBlock
from rdma_mig.memory.page_stream import (
    PageCounters,
    PageReader,
    PageWriter,
    Stage,
    XbzrleCache,
)
from rdma_mig.memory.ram import GuestRam

PAGE = 4096
many = settings(deadline=None, derandomize=True, database=None, max_examples=300)


def uleb(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])


def encoded(old, new):
    """XBZRLE as docs/protocol.md describes it, byte by byte."""
    out = b""
    pairs = list(zip(old, new, strict=True))
    groups = itertools.groupby(pairs, lambda pair: pair[0] == pair[1])
    runs = [(same, len(list(run))) for same, run in groups]
    if runs and not runs[0][0]:
        runs.insert(0, (True, 0))
    at = 0
    # What stays at the end has nothing after it, and is not mentioned.
    for (_, stay), (_, change) in zip(runs[::2], runs[1::2], strict=False):
        at += stay
        out += uleb(stay) + uleb(change) + new[at : at + change]
        at += change
    return out


def decoded(src, page):
    """What XBZRLE makes of a page, byte by byte; None when it is broken."""
    page, at, source = bytearray(page), 0, 0

    def count():
        nonlocal source
        if len(src) - source < 2:
            return None
        low, high = src[source : source + 2]
        source += 1 if low < 128 else 2
        if low < 128:
            return low
        return None if high & 128 else low & 127 | high << 7

    first = True
    while source < len(src):
        stay = count()
        if stay is None or (stay == 0 and not first) or at + stay > len(page):
            return None
        at += stay
        change = count()
        if not change or at + change > len(page) or source + change > len(src):
            return None
        page[at : at + change] = src[source : source + change]
        at += change
        source += change
        first = False
    return bytes(page), at


def ours(src, page):
    copy = bytearray(page)
    at = _stream.xbzrle_decode_buffer(src, copy)
    return None if at < 0 else (bytes(copy), at)


# Pages that differ in a few stretches, as pages do, and in single bytes all over.
sizes = st.integers(1, 700) | st.sampled_from([4095, PAGE, 16383])
stretches = st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(1, 300)), max_size=12)


@st.composite
def changes(draw):
    size = draw(sizes)
    old = random.Random(draw(st.integers(0, 99))).randbytes(size)
    new = bytearray(old)
    for start, length in draw(stretches):
        for at in range(start % size, min(start % size + length, size)):
            new[at] ^= draw(st.sampled_from([1, 0x80, 0xFF])) if length < 9 else at % 256
    return old, bytes(new)


@many
@given(changes())
def test_encoding_is_that_of_the_reference(pair):
    old, new = pair
    wanted = encoded(old, new)
    room = bytearray(2 * len(new) + 8)
    size = _stream.xbzrle_encode_buffer(old, new, room)
    assert bytes(room[:size]) == wanted
    if old == new:
        assert size == 0
        return
    # It fits into exactly as much as it needs, and leaves alone what is behind that.
    exact = bytearray(b"\xee" * (size + 4))
    assert _stream.xbzrle_encode_buffer(old, new, memoryview(exact)[:size]) == size
    assert exact == wanted + b"\xee" * 4
    assert _stream.xbzrle_encode_buffer(old, new, memoryview(exact)[: size - 1]) == -1
    assert exact[size:] == b"\xee" * 4
    page, reached = decoded(wanted, old)
    assert page == new
    assert ours(wanted, old) == (new, reached)


def test_every_pair_of_single_changes_of_a_short_page():
    """All places of two changes against the words that are compared at a time."""
    old = bytes(range(80))
    for one, other in itertools.combinations_with_replacement(range(80), 2):
        new = bytearray(old)
        new[one] ^= 0x80
        new[other] ^= 0x01
        room = bytearray(99)
        size = _stream.xbzrle_encode_buffer(old, new, room)
        assert bytes(room[:size]) == encoded(old, bytes(new))


@many
@given(changes(), st.data())
def test_decoding_what_is_broken_is_that_of_the_reference(pair, data):
    old, new = pair
    source = bytearray(encoded(old, new))
    for _ in range(data.draw(st.integers(1, 3))):
        if source:
            at = data.draw(st.integers(0, len(source) - 1))
            match data.draw(st.sampled_from("xcdi")):
                case "x":
                    source[at] ^= 1 << data.draw(st.integers(0, 7))
                case "c":
                    del source[at:]
                case "d":
                    del source[at]
                case "i":
                    source.insert(at, data.draw(st.sampled_from([0, 1, 127, 128, 255])))
    check(bytes(source), old)


@many
@given(st.binary(max_size=12), st.integers(1, 40))
def test_decoding_any_bytes_is_that_of_the_reference(source, size):
    check(source, bytes(size))


def check(source, old):
    """Decode between guards: neither buffer is left."""
    guarded = bytearray(b"\xa5" * 16 + old + b"\xa5" * 16)
    at = _stream.xbzrle_decode_buffer(source, memoryview(guarded)[16:-16])
    wanted = decoded(source, old)
    assert at == (-1 if wanted is None else wanted[1])
    if wanted is not None:
        assert guarded[16:-16] == wanted[0]
    assert guarded[:16] == guarded[-16:] == b"\xa5" * 16


@pytest.mark.parametrize(
    "source",
    [
        b"\0",  # one byte where a count should start
        b"\x05\x01",  # a literal that is not there
        b"\x05\x02a",
        b"\x05\x00",  # nothing new
        b"\x00\x01a\x00\x01b",  # nothing stays, and not at the beginning
        b"\x00\x01a\x05",
        b"\x00\x01a\x05\x01",
        b"\x80\x80\x01a",  # a count of more than 14 bits
        b"\x00\x81\x80a",
        b"\xff\x7f\x01a",  # 16383 bytes stay
        b"\x80\x20\x01a",  # all 4096 stay, and one more is new
        b"\xff\x1f\x02ab",  # one byte beyond the end
    ],
)
def test_encodings_that_are_broken(source):
    assert decoded(source, bytes(PAGE)) is None
    check(source, bytes(PAGE))


def test_encodings_that_just_fit():
    assert ours(b"", b"page") == (b"page", 0)
    assert ours(b"\xff\x1f\x01a", bytes(PAGE)) == (bytes(PAGE - 1) + b"a", PAGE)
    assert ours(b"\x00\x80\x20" + b"b" * PAGE, bytes(PAGE)) == (b"b" * PAGE, PAGE)


def test_a_count_of_three_bytes_where_it_would_fit():
    check(b"\x80\x80\x01a", bytes(40000))
    check(b"\x00\x80\x80\x01" + bytes(20000), bytes(40000))


def test_buffers_that_cannot_be_encoded():
    for old, new in [(b"", b""), (b"a", b"bc"), (bytes(16384), bytes(16384))]:
        with pytest.raises(ValueError, match="XBZRLE"):
            _stream.xbzrle_encode_buffer(old, new, bytearray(99))
    assert _stream.xbzrle_encode_buffer(b"a", b"a", bytearray()) == 0
    assert _stream.xbzrle_encode_buffer(b"a", b"b", bytearray()) == -1


def test_filling():
    data = bytearray(b"old" * 5000)
    _stream.ram_handle_compressed(memoryview(data)[1:-1], 0)
    assert data == b"o" + bytes(len(data) - 2) + b"d"
    _stream.ram_handle_compressed(data, 0x5A)
    assert data == b"\x5a" * 15000
    with pytest.raises(ValueError, match="256"):
        _stream.ram_handle_compressed(data, 256)


# The cache, and what the writer makes of it


PAGES = 64


class Ends:
    """A guest's RAM at both ends, and a writer and a reader between them."""

    def __init__(self, size=PAGES * PAGE):
        self.ram = GuestRam([RamBlock("rom", PAGE), RamBlock("ram", PAGES * PAGE)])
        self.copy = GuestRam([guest.block for guest in self.ram])
        self.cache = XbzrleCache(size)
        self.writer = PageWriter(self.ram, self.cache)
        self.reader = PageReader(self.copy)

    def put(self, page, data, at=0):
        with self.ram[1].memory.view() as view:
            view[page * PAGE + at : page * PAGE + at + len(data)] = data

    def send(self, *pages):
        """Send pages of the larger block (none: all) and return what was counted meanwhile."""
        before, loaded = self.writer.counters, self.reader.counters
        dirty = None
        if pages:
            dirty = DirtyBitmap(PAGES)
            for page in pages:
                dirty.set(page)
        for piece in self.writer.pieces(1, dirty):
            assert self.reader.load(piece) == len(piece)
        with self.ram[1].memory.view() as ours, self.copy[1].memory.view() as theirs:
            for page in pages or range(PAGES):
                at = slice(page * PAGE, (page + 1) * PAGE)
                assert ours[at] == theirs[at], page
        sent = difference(self.writer.counters, before)
        arrived = difference(self.reader.counters, loaded)
        shared = ("normal", "duplicate", "xbzrle_pages", "xbzrle_bytes")
        assert {k: v for k, v in sent.items() if k in shared} == arrived
        return sent

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ram.close()
        self.copy.close()


def difference(after, before):
    names = PageCounters.__slots__
    values = {name: getattr(after, name) - getattr(before, name) for name in names}
    return {name: value for name, value in values.items() if value}


def noise(seed=0):
    return random.Random(seed).randbytes(PAGE)


def test_first_pass_neither_asks_nor_fills_the_cache():
    with Ends() as ends:
        ends.put(3, noise())
        assert ends.send() == {"normal": 1, "duplicate": PAGES - 1}
        assert len(ends.cache) == 0
        assert ends.send(3) == {"normal": 1}


def test_what_was_sent_is_sent_as_changes_from_then_on():
    with Ends() as ends:
        ends.writer.stage = Stage.ROUND
        ends.put(3, noise())
        assert ends.send(3) == {"normal": 1, "xbzrle_cache_miss": 1}
        ends.put(3, b"new", 77)
        record = 9 + 3 + 3 + 5  # "ram", one pair of counts, three bytes
        assert ends.send(3) == {"xbzrle_pages": 1, "xbzrle_bytes": record}
        assert ends.send(3) == {"xbzrle_unchanged": 1}, "and nothing goes into the stream"
        ends.put(3, noise(1))
        assert ends.send(3) == {"normal": 1, "xbzrle_overflow": 1}
        ends.put(3, b"new", 4093)
        assert ends.send(3)["xbzrle_pages"] == 1


def test_a_page_sent_as_zero_is_in_the_cache_as_zeros():
    with Ends() as ends:
        ends.writer.stage = Stage.ROUND
        assert ends.send(3) == {"duplicate": 1}
        ends.put(3, b"x", 5)
        assert ends.send(3)["xbzrle_pages"] == 1
        ends.put(3, b"\0", 5)
        assert ends.send(3) == {"duplicate": 1}
        ends.put(3, b"y", 6)
        assert ends.send(3)["xbzrle_pages"] == 1


def test_last_stage_asks_the_cache_and_does_not_fill_it():
    with Ends() as ends:
        ends.writer.stage = Stage.ROUND
        for page in (3, 5):
            ends.put(page, noise())
            ends.send(page)
        ends.writer.stage = Stage.LAST
        ends.put(3, b"new")
        ends.put(4, noise(4))
        ends.put(5, bytes(PAGE))
        counted = ends.send(3, 4, 5)
        del counted["xbzrle_bytes"]
        assert counted == {
            "xbzrle_pages": 1, "normal": 1, "xbzrle_cache_miss": 1, "duplicate": 1,
        }  # fmt: skip
        assert len(ends.cache) == 0
        # Should it go on all the same, nothing is encoded against what the destination lacks.
        ends.put(3, noise(2), 8)
        ends.put(5, b"x")
        assert ends.send(3, 5) == {"normal": 2, "xbzrle_cache_miss": 2}


def test_pages_that_meet_in_a_slot_change_places_when_the_older_one_has_aged():
    with Ends(4 * PAGE) as ends:
        ends.writer.stage = Stage.ROUND
        ends.put(1, noise(1))
        ends.put(5, noise(5))
        ends.send(1)
        for age in (0, 1):
            ends.cache.age = age
            assert ends.send(5) == {"normal": 1, "xbzrle_cache_miss": 1}
        ends.put(1, b"new")
        assert ends.send(1)["xbzrle_pages"] == 1, "young enough at 1 to be kept, and is 1 now"
        ends.cache.age = 2
        assert ends.send(5)["xbzrle_cache_miss"] == 1
        ends.cache.age = 3
        assert ends.send(5)["xbzrle_cache_miss"] == 1
        ends.put(5, b"new")
        assert ends.send(5)["xbzrle_pages"] == 1
        ends.put(1, b"newer")
        assert ends.send(1)["xbzrle_cache_miss"] == 1


def test_blocks_do_not_share_pages():
    with Ends(2 * PAGE) as ends:
        ends.writer.stage = Stage.ROUND
        ends.put(0, noise())
        ends.send(0)
        with ends.ram[0].memory.view() as rom:
            rom[:] = noise()
        for piece in ends.writer.pieces(0):
            ends.reader.load(piece)
        assert ends.writer.counters.normal == 2
        with ends.copy[0].memory.view() as rom:
            assert rom == noise()


def test_resizing_keeps_what_fits():
    with Ends() as ends:
        ends.writer.stage = Stage.ROUND
        for page in range(PAGES):
            ends.put(page, noise(page + 1))
        ends.send()
        assert len(ends.cache) == PAGES
        assert ends.cache.resize(16 * PAGE + 5000) == ends.cache.size == 16 * PAGE
        assert len(ends.cache) == 16
        ends.cache.age = 1
        assert ends.cache.resize(2 * PAGES * PAGE) == 2 * PAGES * PAGE
        assert len(ends.cache) == 16
        for page in range(PAGES):
            ends.put(page, b"new")
        assert ends.send()["xbzrle_pages"] == 16
        for size in (0, -1, PAGE - 1):
            with pytest.raises(ValueError, match="cache"):
                ends.cache.resize(size)
        with pytest.raises(HostError, match="no memory"):
            ends.cache.resize(1 << 60)
        assert ends.cache.size == 2 * PAGES * PAGE


def test_a_new_writer_empties_the_cache():
    with Ends() as ends:
        ends.writer.stage = Stage.ROUND
        ends.put(1, noise())
        ends.send(1)
        assert len(ends.cache) == 1
        PageWriter(ends.ram, ends.cache)
        assert len(ends.cache) == 0


def test_memory_may_be_written_while_it_is_encoded(tmp_path):
    """The cache has what was sent, and not what was there a moment later."""
    kit = writer_kit.build(tmp_path)
    with Ends() as ends:
        ends.writer.stage = Stage.ROUND
        for page in range(PAGES):
            ends.put(page, noise(page))
        with writer_kit.running(kit.flip_bytes, ends.ram[1].memory.address, PAGES) as control:
            while ends.writer.counters.xbzrle_pages < 20_000:
                for piece in ends.writer.pieces(1):
                    assert ends.reader.load(piece) == len(piece)
            assert control.writes > 100_000
        ends.send()


def test_resizing_while_pages_are_written_and_sent():
    """A writer of memory and a resizer at full speed: both ends agree when it is over."""
    with Ends() as ends:
        ends.writer.stage = Stage.ROUND
        over = threading.Event()
        resized = 0

        def write():
            rng = random.Random(7)
            while not over.is_set():
                ends.put(rng.randrange(PAGES), rng.randbytes(9), rng.randrange(PAGE - 9))

        def resize():
            nonlocal resized
            for pages in itertools.cycle([1, 8, 64, 256]):
                if over.is_set():
                    break
                ends.cache.resize(pages * PAGE)
                resized += 1

        threads = [threading.Thread(target=work) for work in (write, resize)]
        for thread in threads:
            thread.start()
        try:
            end = time.monotonic() + 60
            while resized < 20 or ends.writer.counters.xbzrle_pages < 300:
                assert time.monotonic() < end, (resized, ends.writer.counters)
                ends.cache.age += 1
                for piece in ends.writer.pieces(1):
                    assert ends.reader.load(piece) == len(piece)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        ends.send()
