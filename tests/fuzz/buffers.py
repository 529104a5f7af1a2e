# SPDX-License-Identifier: Apache-2.0
"""The Cython functions that take buffers, against plain Python, at the very edge of memory.

    buffers.py [--seconds N] [--seed S] [--only pages|writes]

Each buffer has a page without access right before or behind it, or is of malloc(), where a build
with AddressSanitizer (sanitize.py) watches both sides. Of _verbs, the queue that makes RDMA writes
of pages is tried: without a device, since it asks for the keys of a chunk before it posts. A seed
repeats a run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import mmap
import os
import random
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class Memory:
    """Buffers with nothing behind them, or nothing before."""

    def __init__(self, choose: random.Random, pages: int = 8) -> None:
        self._choose = choose
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        self.size = pages * PAGE
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for guard in (begin, begin + self.size + PAGE):
            if _libc.mprotect(ctypes.c_void_p(guard), PAGE, mmap.PROT_READ & 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def holding(self, content: bytes) -> memoryview | bytearray:
        """A writable buffer with this in it, at one edge of the memory, or of malloc()."""
        size = len(content)
        if size > self.size or self._choose.random() < 0.3:
            return bytearray(content)
        start = PAGE if self._choose.random() < 0.5 else PAGE + self.size - size
        view = memoryview(self._map)[start : start + size]
        view[:] = content
        return view

    def words(self, values: array[int]) -> memoryview | array[int]:
        """The same for 64-bit words."""
        held = self.holding(values.tobytes())
        return array("Q", values) if isinstance(held, bytearray) else held.cast("Q")


class Trial:
    """The functions of _pages, with one stream of random numbers."""

    def __init__(self, seed: int) -> None:
        self.pages = importlib.import_module("rdma_mig._pages")
        self.choose = random.Random(seed)
        self.memory = Memory(self.choose)
        self.other = Memory(self.choose)

    def content(self, most: int = 6 * PAGE) -> bytes:
        """Zeros with some data, or data with some zeros; any size, also 0."""
        choose = self.choose
        size = choose.choice([0, 1, 7, 8, 63, 64, PAGE, PAGE + 1, choose.randrange(most)])
        data = bytearray(size) if choose.random() < 0.7 else bytearray(os.urandom(size))
        for _ in range(choose.randrange(4)):
            if size:
                at = choose.choice([0, size - 1, choose.randrange(size)])
                data[at] = choose.randrange(256)
                end = min(size, at + choose.randrange(1, PAGE))
                if choose.random() < 0.5:
                    data[at:end] = bytes(end - at)
        return bytes(data)

    def bits(self) -> array[int]:
        """Words of a bitmap: full, empty, runs, noise."""
        choose = self.choose
        count = choose.choice([0, 1, 2, choose.randrange(64)])
        value = 0
        for _ in range(choose.randrange(6)):
            if count:
                start = choose.randrange(64 * count)
                value |= ((1 << choose.randrange(1, 200)) - 1) << start
        if choose.random() < 0.2:
            value = choose.getrandbits(64 * count) if count else 0
        value &= (1 << 64 * count) - 1
        return array("Q", value.to_bytes(8 * count, "little"))

    # ---- one method a function; each compares with what plain Python says ----

    def is_zero(self) -> None:
        data = self.content()
        assert self.pages.is_zero(self.memory.holding(data)) == (not any(data))

    def mark_data(self) -> None:
        data, words = self.content(), self.bits()
        unit = self.choose.choice([1, 3, 64, PAGE, 1 << 20])
        units = -(-len(data) // unit)
        first = self.choose.randrange(64 * len(words) + 2)
        held, marked = self.memory.holding(data), self.other.words(words)
        if first + units > 64 * len(words):
            self.refused(IndexError, lambda: self.pages.mark_data(held, unit, marked, first))
            assert array("Q", marked.tobytes()) == words
            return
        value = int.from_bytes(words.tobytes(), "little")
        set_ = [at for at in range(units) if any(data[at * unit : (at + 1) * unit])]
        for at in set_:
            value |= 1 << first + at
        assert self.pages.mark_data(held, unit, marked, first) == len(set_)
        assert int.from_bytes(marked.tobytes(), "little") == value

    def assign_bits(self) -> None:
        words = self.bits()
        first, last = sorted(self.choose.randrange(64 * len(words) + 2) for _ in range(2))
        value = self.choose.random() < 0.5
        held = self.memory.words(words)
        if last > 64 * len(words):
            self.refused(IndexError, lambda: self.pages.assign_bits(held, first, last, value))
            return
        mask = (1 << last) - (1 << first)
        before = int.from_bytes(words.tobytes(), "little")
        self.pages.assign_bits(held, first, last, value)
        after = int.from_bytes(held.tobytes(), "little")
        assert after == (before | mask if value else before & ~mask)

    def count_bits(self) -> None:
        words = self.bits()
        wanted = int.from_bytes(words.tobytes(), "little").bit_count()
        assert self.pages.count_bits(self.memory.words(words)) == wanted

    def bitmap_runs(self) -> None:
        choose, words = self.choose, self.bits()
        end = choose.randrange(64 * len(words) + 1)
        first = choose.randrange(end + 1)
        unit = choose.choice([1, PAGE])
        most = unit * choose.choice([1, 2, 5, 256])
        fence = unit * choose.choice([0, 0, 1, 4, 256])
        length = choose.choice([end * unit, max(0, end * unit - choose.randrange(2 * unit))])
        room = choose.choice([0, 2, 3, 8, 600])
        held, out = self.memory.words(words), self.other.words(array("Q", bytes(8 * room)))
        value = int.from_bytes(words.tobytes(), "little")
        count, at = self.pages.bitmap_runs(held, first, end, unit, length, most, fence, out)
        got = [(out[2 * i], out[2 * i + 1]) for i in range(count)]
        wanted = _runs(value, first, end, unit, length, most, fence)
        assert got == wanted[: room // 2], (got, wanted)
        assert at <= end
        if len(wanted) < room // 2:
            assert at == end

    def touching(self) -> None:
        data = self.content()
        held = self.memory.holding(data)
        self.pages.touch_write(held, self.choose.choice([1, 64, PAGE]))
        self.pages.read_touch(held, self.choose.choice([1, 64, PAGE]))
        assert bytes(held) == data
        if isinstance(held, memoryview):
            self.pages.populate_write(held)
            assert bytes(held) == data

    def files(self) -> None:
        """Data of a buffer into a sparse file, and back."""
        data = self.content()
        unit = self.choose.choice([64, PAGE])
        offset = self.choose.choice([0, PAGE, self.choose.randrange(1 << 20)])
        held = self.memory.holding(data)
        units = [
            data[at : at + unit] for at in range(0, len(data), unit) if any(data[at : at + unit])
        ]
        wanted = sum(map(len, units))
        assert self.pages.data_bytes(held, unit) == wanted
        fd = os.memfd_create("fuzz")
        try:
            assert self.pages.allocate_data(fd, held, offset, unit) == wanted
            assert self.pages.write_data(fd, held, offset, unit) == wanted
            os.ftruncate(fd, offset + len(data))
            assert os.pread(fd, len(data), offset) == data
            back = self.other.holding(bytes(len(data)))
            assert self.pages.read_data(fd, back, offset) <= len(data)
            assert bytes(back) == data
            if data:
                os.ftruncate(fd, offset + len(data) - 1)
                assert self.pages.read_data(fd, back, offset) < 0
        finally:
            os.close(fd)

    def wrong(self) -> None:
        """Sizes that make no sense are refused."""
        held, words = self.memory.holding(self.content()), self.other.words(self.bits())
        value = self.choose.choice([0, -1, -(1 << 40)])
        self.refused(ValueError, lambda: self.pages.mark_data(held, value, words))
        self.refused(ValueError, lambda: self.pages.data_bytes(held, value))
        self.refused(ValueError, lambda: self.pages.touch_write(held, value))
        huge = self.choose.choice([1 << 62, (1 << 64) - 1, 1 << 64, -1])
        self.refused(
            (IndexError, OverflowError, ValueError),
            lambda: self.pages.assign_bits(words, 0, huge, True),
        )
        self.refused(
            (IndexError, OverflowError, ValueError),
            lambda: self.pages.mark_data(bytes(1), 1, words, huge),
        )

    @staticmethod
    def refused(kinds: type | tuple[type, ...], call: Callable[[], object]) -> None:
        try:
            call()
        except kinds:
            return
        raise AssertionError("it was accepted")

    def run(self, count: int) -> None:
        """Try each function so many times."""
        for _ in range(count):
            for trial in (
                self.is_zero,
                self.mark_data,
                self.assign_bits,
                self.count_bits,
                self.bitmap_runs,
                self.touching,
                self.files,
                self.wrong,
            ):
                trial()


def _runs(
    value: int, first: int, end: int, unit: int, length: int, most: int, fence: int
) -> list[tuple[int, int]]:
    """The runs of set bits, a bit at a time."""
    runs: list[tuple[int, int]] = []
    for bit in range(first, end):
        start, stop = bit * unit, min((bit + 1) * unit, length)
        if not value >> bit & 1 or start >= length:
            continue
        if runs:
            at, size = runs[-1]
            joined = at + size == start and size + unit <= most
            if joined and not (fence and start % fence == 0):
                runs[-1] = (at, stop - at)
                continue
        runs.append((start, stop - start))
    return runs


class WriteTrial:
    """The queue of RDMA writes, against a list of the writes that it has to make."""

    def __init__(self, seed: int) -> None:
        self.verbs = importlib.import_module("rdma_mig._verbs")
        self.choose = random.Random(seed)

    def run(self, count: int) -> None:
        """Try so many queues."""
        for _ in range(count):
            self.one()

    def one(self) -> None:
        """Some blocks, pages and runs of them, and wrong numbers between."""
        choose = self.choose
        chunk = choose.choice([PAGE, 1 << 20])
        most = choose.choice([1, PAGE, 3 * PAGE, 1 << 20, 1 << 30])
        lengths = [choose.randrange(1, 5 * chunk) for _ in range(choose.randrange(1, 4))]
        made: list[tuple[int, int, int]] = []

        def interrupted(_outcome: int) -> None:
            block, at, length = queue.wanted
            piece = min(length, chunk - at % chunk)
            made.append((block, at, piece))
            queue.skip(piece)

        # It is never posted to: no chunk gets keys while pages are taken.
        work = self.verbs.WorkQueue.__new__(self.verbs.WorkQueue)
        queue = self.verbs.WriteQueue(
            work, chunk_size=chunk, max_write=most, interrupted=interrupted
        )
        queue.set_targets([(0, 0, 0, 0, length) for length in lengths], dynamic=True)
        queue.open()
        wanted: list[tuple[int, int, int]] = []
        pending: list[int] = []
        for _ in range(choose.randrange(12)):
            block = choose.randrange(len(lengths))
            if choose.random() < 0.6:
                self.pages(queue, block, lengths[block], chunk, wanted, pending)
            elif choose.random() < 0.7:
                _flush(wanted, pending)
                self.runs(queue, block, lengths[block], chunk, most, wanted)
            else:
                self.wrong(queue, lengths, chunk)
        queue.flush()
        _flush(wanted, pending)
        assert made == wanted, (made, wanted)
        queue.close()
        for block, length in enumerate(lengths):
            for at in (0, -(-length // chunk) - 1):
                queue.set_chunk_keys(block, at, 1, 1)

    def pages(
        self, queue: Any, block: int, length: int, chunk: int, wanted: Any, pending: list[int]
    ) -> None:
        """Pages in a row, from somewhere."""
        at = self.choose.randrange(length)
        for _ in range(self.choose.randrange(1, 8)):
            size = min(self.choose.choice([1, 512, PAGE]), length - at, chunk - at % chunk)
            if not size:
                return
            queue.save_page(block, at, size)
            if pending[:1] == [block] and pending[2] == at and at % chunk:
                pending[2] = at + size
            else:
                _flush(wanted, pending)
                pending[:] = [block, at, at + size]
            at += size

    def runs(self, queue: Any, block: int, length: int, chunk: int, most: int, wanted: Any) -> None:
        """Many runs at once; the last may end where the block does."""
        rows = []
        for _ in range(self.choose.randrange(1, 4)):
            at = self.choose.randrange(length)
            # A write of one byte each would be as many as there are bytes.
            size = min(self.choose.choice([1, PAGE, length]), length - at, 2000 * most)
            rows += [at, size]
            while size:
                piece = min(size, chunk - at % chunk)
                wanted.append((block, at, piece))
                at, size = at + piece, size - piece
        table = memoryview(array("Q", rows)).cast("B").cast("Q", [len(rows) // 2, 2])
        assert queue.save_runs(block, table) == sum(rows[1::2])

    def wrong(self, queue: Any, lengths: list[int], chunk: int) -> None:
        """What lies outside of all blocks is refused, and changes nothing."""
        block = self.choose.randrange(len(lengths))
        length = lengths[block]
        beyond = self.choose.choice([length, length + 1, 1 << 63, (1 << 64) - 1])
        chunks = -(-length // chunk)
        table = memoryview(array("Q", [0, 1, beyond, 1])).cast("B").cast("Q", [2, 2])
        for call in (
            lambda: queue.save_page(block, beyond, 1),
            lambda: queue.save_page(block, length - 1, 2),
            lambda: queue.save_page(block, 0, 0),
            lambda: queue.save_page(len(lengths), 0, 1),
            lambda: queue.save_page(-1, 0, 1),
            lambda: queue.save_page(block, 1, (1 << 64) - 1),
            lambda: queue.save_runs(block, table),
            lambda: queue.set_chunk_keys(block, chunks, 1, 1),
            lambda: queue.set_chunk_keys(block, (1 << 64) - 1, 1, 1),
            lambda: queue.set_chunk_keys(len(lengths), 0, 1, 1),
            lambda: queue.set_chunk_keys(-1, 0, 1, 1),
            lambda: queue.set_chunk_keys(block, 0, 1, 0),
        ):
            Trial.refused(ValueError, call)


def _flush(wanted: list[tuple[int, int, int]], pending: list[int]) -> None:
    if pending:
        block, start, end = pending
        wanted.append((block, start, end - start))
        pending.clear()


TRIALS: dict[str, Callable[[int], Trial | WriteTrial]] = {"pages": Trial, "writes": WriteTrial}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", choices=TRIALS)
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else list(TRIALS):
        end = time.monotonic() + arguments.seconds
        seed = arguments.seed
        while time.monotonic() < end:
            try:
                TRIALS[name](seed).run(25)
            except BaseException:
                print(f"buffers: {name} failed with --seed {seed}", file=sys.stderr)
                raise
            seed += 1
        rounds = 25 * (seed - arguments.seed)
        seeds = f"seeds {arguments.seed} to {seed - 1}"
        print(f"buffers: {name}, {rounds} rounds, {seeds}, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
