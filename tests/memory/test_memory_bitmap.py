# SPDX-License-Identifier: Apache-2.0
"""The dirty bitmap against a set of page numbers."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdma_mig.memory import CHUNK_SIZE, DirtyBitmap

PAGES = 1000
many = settings(deadline=None, derandomize=True, database=None, max_examples=200)
spans = st.lists(
    st.tuples(st.booleans(), st.integers(0, PAGES - 1), st.integers(0, 300)), max_size=12
)


def apply(steps):
    bitmap, model = DirtyBitmap(PAGES), set()
    for mark, first, wanted in steps:
        count = min(wanted, PAGES - first)
        pages = set(range(first, first + count))
        if mark:
            bitmap.set(first, count)
            model |= pages
        else:
            bitmap.clear(first, count)
            model -= pages
    return bitmap, model


def all_runs(bitmap, *args, **named):
    found = []
    for batch in bitmap.runs(*args, **named):
        flat = list(batch)
        assert flat
        assert len(flat) % 2 == 0
        found += list(zip(flat[::2], flat[1::2], strict=True))
    return found


@many
@given(spans)
def test_set_and_clear(steps):
    bitmap, model = apply(steps)
    assert {page for page in range(PAGES) if bitmap[page]} == model
    assert bitmap.count() == len(model)
    assert len(bitmap) == PAGES


@many
@given(
    spans,
    st.integers(1, 300),
    st.sampled_from([0, 1, 3, 64, 256]),
    st.integers(1, 5),
    st.integers((PAGES - 40) * 4096, PAGES * 4096),
)
def test_runs(steps, most, boundary, batch, length):
    bitmap, model = apply(steps)
    runs = all_runs(bitmap, most * 4096, boundary=boundary * 4096, batch=batch, length=length)
    covered = set()
    for offset, size in runs:
        assert offset % 4096 == 0
        assert 0 < size <= most * 4096
        assert offset + size <= length
        assert size % 4096 == 0 or offset + size == length
        if boundary:
            assert offset // 4096 // boundary == (offset + size - 1) // 4096 // boundary
        covered |= set(range(offset // 4096, -(-(offset + size) // 4096)))
    assert covered == {page for page in model if page * 4096 < length}
    for (offset, size), (following, _) in pairwise(runs):
        # Two runs meet only where a limit cut them.
        assert following >= offset + size
        if following == offset + size:
            assert size == most * 4096 or (boundary and following // 4096 % boundary == 0)


def test_the_default_is_one_write_a_chunk():
    bitmap = DirtyBitmap.of_length(3 * CHUNK_SIZE + 100)
    bitmap.fill()
    assert all_runs(bitmap, length=3 * CHUNK_SIZE + 100) == [
        (0, CHUNK_SIZE),
        (CHUNK_SIZE, CHUNK_SIZE),
        (2 * CHUNK_SIZE, CHUNK_SIZE),
        (3 * CHUNK_SIZE, 100),
    ]
    assert all_runs(bitmap, 1 << 30, boundary=0) == [(0, 3 * CHUNK_SIZE + 4096)]


def test_fill_leaves_the_bits_behind_the_last_page_clear():
    bitmap = DirtyBitmap(70)
    bitmap.fill()
    assert bitmap.count() == 70
    assert list(bitmap.words) == [2**64 - 1, 2**6 - 1]
    bitmap.fill(False)
    assert bitmap.count() == 0
    assert all_runs(bitmap) == []


def test_words_are_laid_out_as_qemu_lays_them_out():
    bitmap = DirtyBitmap(128)
    bitmap.set(0)
    bitmap.set(9)
    bitmap.set(64)
    assert list(bitmap.words) == [1 | 1 << 9, 1]


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 101), (100, 1), (5, -1), (99, 2)])
def test_pages_that_do_not_exist(first, count):
    bitmap = DirtyBitmap(100)
    for call in (bitmap.set, bitmap.clear):
        with pytest.raises(IndexError):
            call(first, count)
    assert bitmap.count() == 0


def test_bad_limits():
    bitmap = DirtyBitmap(100)
    bitmap.fill()
    for bad in ({"max_bytes": 5000}, {"boundary": 5000}, {"max_bytes": 0}, {"length": 1 << 30}):
        with pytest.raises(ValueError, match=r"multiple|positive|fit"):
            list(bitmap.runs(**bad))
    with pytest.raises(ValueError, match="pages"):
        DirtyBitmap(-1)
    assert all_runs(DirtyBitmap(0)) == []
