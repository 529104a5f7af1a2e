# SPDX-License-Identifier: Apache-2.0
"""The Cython kernels against the plainest Python that does the same."""

import errno
import mmap
import os
import tempfile
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdma_mig import _pages
from rdma_mig.memory import DirtyBitmap

many = settings(deadline=None, derandomize=True, database=None, max_examples=200)

# Sparse bytes: a size, and where something is not zero.
sparse = st.integers(0, 3000).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(0, max(n - 1, 0)), max_size=6 if n else 0))
)


def fill(size, marks):
    data = bytearray(size)
    for mark in marks:
        data[mark] = 1 + mark % 255
    return data


def units(data, unit):
    return [any(data[at : at + unit]) for at in range(0, len(data), unit)]


@many
@given(sparse, st.integers(0, 9))
def test_is_zero(data, skip):
    raw = fill(*data)
    assert _pages.is_zero(memoryview(raw)[skip:]) is not any(raw[skip:])


def test_every_single_byte_of_a_page_counts():
    page = bytearray(4096 + 300)
    for at in range(len(page)):
        page[at] = 0x80
        assert not _pages.is_zero(page)
        page[at] = 0
    assert _pages.is_zero(page)
    assert _pages.is_zero(bytes(page)), "constant buffers too"


@many
@given(sparse, st.sampled_from([1, 7, 64, 512]), st.integers(0, 100))
def test_mark_data(data, unit, first):
    raw = fill(*data)
    expected = units(raw, unit)
    bitmap = DirtyBitmap(first + len(expected))
    assert bitmap.mark_data(raw, unit, first) == sum(expected)
    assert [bitmap[first + i] for i in range(len(expected))] == expected
    assert bitmap.count() == sum(expected)
    assert _pages.data_bytes(raw, unit) == sum(
        min(unit, len(raw) - i * unit) for i, data in enumerate(expected) if data
    )


def test_marks_do_not_leave_the_bitmap():
    with pytest.raises(IndexError):
        _pages.mark_data(bytes(65 * 8), 8, array("Q", [0]))
    with pytest.raises(IndexError):
        _pages.mark_data(bytes(8), 8, array("Q", [0]), 64)
    with pytest.raises(ValueError, match="unit"):
        _pages.mark_data(bytes(8), 0, array("Q", [0]))
    with pytest.raises(IndexError):
        _pages.assign_bits(array("Q", [0]), 60, 65, True)
    with pytest.raises(OverflowError):
        _pages.assign_bits(array("Q", [0]), -1, 5, True)


@many
@given(sparse, st.sampled_from([256, 512]))
def test_sparse_files_come_back(data, unit):
    raw = fill(*data)
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), 100 + len(raw))
        written = _pages.write_data(file.fileno(), raw, 100, unit)
        assert written == _pages.data_bytes(raw, unit)
        assert os.pread(file.fileno(), len(raw) + 1, 100) == bytes(raw)
        back = bytearray(len(raw))
        read = _pages.read_data(file.fileno(), back, 100)
        assert back == raw
        assert read >= (written > 0)


def test_holes_are_not_read():
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), 1 << 20)
        os.pwrite(file.fileno(), b"x", 512 << 10)
        buffer = bytearray(b"\xee" * (1 << 20))
        read = _pages.read_data(file.fileno(), buffer, 0)
        assert 1 <= read <= 64 << 10
        assert buffer[0] == buffer[-1] == 0xEE, "the hole was read"
        assert buffer[512 << 10] == ord("x")
        assert _pages.read_data(file.fileno(), memoryview(buffer)[: 256 << 10], 0) == 0


def test_a_file_that_ends_early_is_an_error():
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 5000)
        file.flush()
        assert _pages.read_data(file.fileno(), bytearray(5001), 0) == -errno.EIO
        assert _pages.read_data(file.fileno(), bytearray(10), 6000) == -errno.EIO
        assert _pages.read_data(file.fileno(), bytearray(5000), 0) == 5000
        os.ftruncate(file.fileno(), 4096)
        os.ftruncate(file.fileno(), 1 << 20)
        assert _pages.read_data(file.fileno(), bytearray(8192), (1 << 20) - 8191) == -errno.EIO


def test_failures_of_the_system_are_errnos():
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert _pages.write_data(fd, b"x", 0, 4096) == -errno.EBADF
        assert _pages.allocate_data(fd, b"x", 0, 4096) == -errno.EBADF
        assert _pages.reserve_space(fd, 0, 4096) == -errno.EBADF
        assert _pages.read_data(-1, bytearray(1), 0) == -errno.EBADF
    finally:
        os.close(fd)


def test_allocation_is_for_data_only():
    data = bytearray(1 << 20)
    data[0] = data[600_000] = 1
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), len(data))
        assert _pages.allocate_data(file.fileno(), data, 0, 4096) == 8192
        status = os.fstat(file.fileno())
        assert status.st_blocks * 512 == 8192
        assert status.st_size == len(data)
        _pages.start_writeback(file.fileno(), 0, 8192)


def test_reserved_space_does_not_change_the_size():
    with tempfile.TemporaryFile() as file:
        assert _pages.reserve_space(file.fileno(), 0, 65536) == 0
        status = os.fstat(file.fileno())
        assert (status.st_size, status.st_blocks * 512) == (0, 65536)


def test_populating_keeps_the_contents():
    with mmap.mmap(-1, 1 << 20) as memory:
        memory[5000] = 7
        assert _pages.populate_write(memory) == 0
        _pages.touch_write(memory, 4096)
        _pages.read_touch(memory, 4096)
        assert memory[5000] == 7
        assert memory[:5000] == bytes(5000)


def test_read_only_buffers_are_not_written():
    for call in (_pages.populate_write, lambda b: _pages.touch_write(b, 4096)):
        with pytest.raises(BufferError):
            call(bytes(10))


def test_addresses():
    with mmap.mmap(-1, 4096) as memory:
        base = _pages.address_of(memory)
        assert base % 4096 == 0
        with memoryview(memory) as view:
            assert _pages.address_of(view[17:]) == base + 17
    with pytest.raises(ValueError, match="empty"):
        _pages.address_of(b"")
