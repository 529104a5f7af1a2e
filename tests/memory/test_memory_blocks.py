# SPDX-License-Identifier: Apache-2.0
"""Chunk arithmetic and RAM blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.memory import CHUNK_SIZE, RamBlock, chunk_count, chunk_of, chunk_range


@given(st.integers(1, 1 << 45))
def test_chunks_tile_the_block(length):
    count = chunk_count(length)
    assert chunk_range(0, length)[0] == 0
    start, size = chunk_range(count - 1, length)
    assert start + size == length
    assert 1 <= size <= CHUNK_SIZE
    assert chunk_of(length - 1) == count - 1
    assert chunk_of(start) == count - 1
    with pytest.raises(IndexError):
        chunk_range(count, length)
    with pytest.raises(IndexError):
        chunk_range(-1, length)


def test_chunk_size_is_the_wire_protocols():
    assert CHUNK_SIZE == 1 << 20
    assert chunk_range(1, (1 << 20) + 1) == (1 << 20, 1)
    assert chunk_count(0) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"idstr": ""},
        {"idstr": "x" * 256},
        {"idstr": "\N{EURO SIGN}" * 86},
        {"length": 0},
        {"length": -1},
        {"length": 1 << 60},
        {"page_size": 0},
        {"page_size": 4097},
        {"page_size": 1 << 50},
        {"guest_address": -1},
        {"guest_address": 1 << 64},
    ],
)
def test_values_that_no_block_has_are_refused(bad):
    good = {"idstr": "pc.ram", "length": 1 << 20, "page_size": 1 << 21, "guest_address": 0}
    RamBlock(**good)
    with pytest.raises(ValueError, match=r"RAM block"):
        RamBlock(**(good | bad))


@pytest.mark.parametrize("call", [chunk_of, chunk_count])
def test_negative_offsets_are_refused(call):
    with pytest.raises(ValueError, match="negative"):
        call(-1)
