# SPDX-License-Identifier: Apache-2.0
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Per-page work without the GIL: zero detection, bitmap runs, population, sparse file I/O.

Every function takes a contiguous buffer of bytes (read-only where nothing is written), holds its
export for as long as it runs, and releases the GIL. Bitmaps are 64-bit words with bit 0 of word 0
first. Functions that make system calls return a negative errno instead of raising, so that the
caller can say in one line which block of which file or machine it was about.
"""

from libc.errno cimport EINTR, EINVAL, EIO, ENXIO, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t

from pages cimport SEEK_DATA, SEEK_HOLE, lseek, rm_is_zero, rm_next_bit

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <unistd.h>

    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif

    static void rm_assign(uint64_t *w, uint64_t from, uint64_t end, int value)
    {
        while (from < end) {
            uint64_t bit = from % 64, n = end - from < 64 - bit ? end - from : 64 - bit;
            uint64_t mask = (n == 64 ? ~0ull : (1ull << n) - 1) << bit;
            if (value)
                w[from / 64] |= mask;
            else
                w[from / 64] &= ~mask;
            from += n;
        }
    }

    static uint64_t rm_count(const uint64_t *w, uint64_t words)
    {
        uint64_t n = 0;
        for (uint64_t i = 0; i < words; i++)
            n += (uint64_t)__builtin_popcountll(w[i]);
        return n;
    }

    /* A write that changes nothing, safe while someone else (a NIC, a guest) writes there. */
    static void rm_touch_write(unsigned char *p, size_t n, size_t page)
    {
        for (size_t i = 0; i < n; i += page)
            __atomic_fetch_or(p + i, 0, __ATOMIC_RELAXED);
    }

    static unsigned rm_touch_read(const unsigned char *p, size_t n, size_t page)
    {
        unsigned sum = 0;
        for (size_t i = 0; i < n; i += page)
            sum += *(const volatile unsigned char *)(p + i);
        return sum;
    }

    static int rm_reserve(int fd, off_t offset, off_t length)
    {
        return fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, length);
    }

    static int rm_punch(int fd, off_t offset, off_t length)
    {
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    }

    static void rm_start_writeback(int fd, off_t offset, off_t length)
    {
        (void)sync_file_range(fd, offset, length, SYNC_FILE_RANGE_WRITE);
    }
    """
    void rm_assign(uint64_t *w, uint64_t start, uint64_t end, int value) nogil
    uint64_t rm_count(const uint64_t *w, uint64_t words) nogil
    void rm_touch_write(uint8_t *p, size_t n, size_t page) nogil
    unsigned rm_touch_read(const uint8_t *p, size_t n, size_t page) nogil
    int rm_reserve(int fd, long offset, long length) nogil
    int rm_punch(int fd, long offset, long length) nogil
    void rm_start_writeback(int fd, long offset, long length) nogil
    int MADV_POPULATE_WRITE
    int madvise(void *address, size_t length, int advice) nogil
    int fallocate(int fd, int mode, long offset, long length) nogil
    ssize_t pwrite(int fd, const void *data, size_t length, long offset) nogil
    ssize_t pread(int fd, void *data, size_t length, long offset) nogil

cdef uint64_t ALL_ONES = <uint64_t>0xffffffffffffffff


def address_of(const uint8_t[::1] buf not None):
    """The address of the buffer's first byte in this process; ``ValueError`` when it is empty."""
    if buf.shape[0] == 0:
        raise ValueError("an empty buffer has no address")
    return <uintptr_t>&buf[0]


def is_zero(const uint8_t[::1] buf not None):
    """Whether every byte of the buffer is zero (an empty one is)."""
    cdef size_t n = <size_t>buf.shape[0]
    cdef int result = 1
    if n:
        with nogil:
            result = rm_is_zero(&buf[0], n)
    return result != 0


cdef size_t _positive(object value, str name) except 0:
    if value <= 0:
        raise ValueError(f"{name} must be positive, not {value}")
    return <size_t>value


def _bits(const uint64_t[::1] words, uint64_t first, uint64_t last):
    if first > last or last > <uint64_t>words.shape[0] * 64:
        raise IndexError(f"bits {first} to {last} of a bitmap of {words.shape[0] * 64}")


def mark_data(const uint8_t[::1] buf not None, unit, uint64_t[::1] words not None, first=0):
    """Set the bit of every unit of ``unit`` bytes that is not wholly zero; return how many.

    Bit ``first`` stands for the buffer's first unit; bits of zero units are left as they are.
    """
    cdef size_t step = _positive(unit, "unit")
    cdef size_t n = <size_t>buf.shape[0], at = 0, size
    cdef uint64_t bit = first, count = 0
    _bits(words, bit, bit + (n + step - 1) // step)
    with nogil:
        while at < n:
            size = step if step < n - at else n - at
            if not rm_is_zero(&buf[at], size):
                words[<Py_ssize_t>(bit >> 6)] |= (<uint64_t>1) << (bit & 63)
                count += 1
            bit += 1
            at += size
    return count


def assign_bits(uint64_t[::1] words not None, first, last, bint value):
    """Set or clear the bits ``first`` (included) to ``last`` (excluded)."""
    cdef uint64_t start = first, end = last
    _bits(words, start, end)
    if start < end:
        with nogil:
            rm_assign(&words[0], start, end, value)


def count_bits(const uint64_t[::1] words not None):
    """How many bits are set."""
    cdef uint64_t count = 0
    if words.shape[0]:
        with nogil:
            count = rm_count(&words[0], <uint64_t>words.shape[0])
    return count


def bitmap_runs(const uint64_t[::1] words not None, first, last, unit, length, max_bytes,
                boundary, uint64_t[::1] out not None):
    """Find runs of set bits and store them in ``out`` as pairs (offset, size), both in bytes.

    Bit ``i`` stands for the bytes from ``i * unit``, the last of which may be cut by ``length``.
    A run is at most ``max_bytes`` long (a multiple of ``unit``) and crosses no multiple of
    ``boundary`` (a multiple of ``unit`` too; 0 for none). Bits ``first`` to ``last`` (excluded)
    are looked at, until they or ``out`` are used up.

    Returns:
        How many pairs were stored, and the bit to go on from (``last`` when done).
    """
    cdef uint64_t step = _positive(unit, "unit")
    cdef uint64_t most = _positive(max_bytes, "max_bytes")
    cdef uint64_t fence = boundary, size = length
    cdef uint64_t at = first, end = last, stop, count = 0, room = <uint64_t>out.shape[0] // 2
    if most % step or fence % step:
        raise ValueError(f"max_bytes {most} and boundary {fence} must be multiples of {step}")
    _bits(words, at, end)
    if size > end * step and end == <uint64_t>words.shape[0] * 64:
        raise ValueError(f"{size} bytes do not fit a bitmap of {end} units of {step}")
    most //= step
    fence //= step
    if at == end:
        return 0, end
    with nogil:
        while count < room:
            at = rm_next_bit(&words[0], at, end, 0)
            if at >= end or at * step >= size:
                at = end
                break
            stop = end if end - at < most else at + most
            if fence and stop > (at // fence + 1) * fence:
                stop = (at // fence + 1) * fence
            stop = rm_next_bit(&words[0], at, stop, ALL_ONES)
            out[<Py_ssize_t>(2 * count)] = at * step
            out[<Py_ssize_t>(2 * count + 1)] = (
                size - at * step if size < stop * step else (stop - at) * step)
            count += 1
            at = stop
    return count, at


def populate_write(uint8_t[::1] buf not None):
    """Make the kernel allocate and map every page of the buffer, contents unchanged.

    The buffer must begin at a page. Returns 0 or a negative errno: ``-EINVAL`` where the kernel
    lacks ``MADV_POPULATE_WRITE`` (before 5.14), ``-EFAULT`` where a touch would raise SIGBUS.
    """
    cdef int result = 0
    cdef size_t n = <size_t>buf.shape[0]
    if n:
        with nogil:
            if madvise(&buf[0], n, MADV_POPULATE_WRITE) < 0:
                result = -errno
    return result


def touch_write(uint8_t[::1] buf not None, page):
    """Write to every page of the buffer without changing a byte: what populates it elsewhere.

    The pages must be backed (fallocate them first): where there is no memory left, this is a
    SIGBUS.
    """
    cdef size_t n = <size_t>buf.shape[0], step = _positive(page, "page")
    if n:
        with nogil:
            rm_touch_write(&buf[0], n, step)


def read_touch(const uint8_t[::1] buf not None, page):
    """Read one byte of every page of the buffer, so that all of it is mapped."""
    cdef size_t n = <size_t>buf.shape[0], step = _positive(page, "page")
    if n:
        with nogil:
            rm_touch_read(&buf[0], n, step)


cdef size_t _run(const uint8_t[::1] buf, size_t at, size_t step, size_t *start) noexcept nogil:
    # The next run of units with data, at or after `at`: its start, and where it ends (0: none).
    cdef size_t n = <size_t>buf.shape[0], size
    while at < n:
        size = step if step < n - at else n - at
        if not rm_is_zero(&buf[at], size):
            break
        at += size
    if at >= n:
        return 0
    start[0] = at
    while at < n:
        size = step if step < n - at else n - at
        if rm_is_zero(&buf[at], size):
            break
        at += size
    return at


def data_bytes(const uint8_t[::1] buf not None, unit):
    """How many bytes lie in units of ``unit`` bytes that are not wholly zero."""
    cdef size_t step = _positive(unit, "unit"), at = 0, start = 0, end
    cdef long total = 0
    with nogil:
        while True:
            end = _run(buf, at, step, &start)
            if end == 0:
                break
            total += <long>(end - start)
            at = end
    return total


def allocate_data(int fd, const uint8_t[::1] buf not None, long offset, unit):
    """Have the file system set blocks aside for every unit of ``buf`` that is not wholly zero.

    ``buf`` is what will be written at ``offset``. Returns the bytes in such units, or a negative
    errno (``-EOPNOTSUPP`` where the file system cannot reserve).
    """
    cdef size_t step = _positive(unit, "unit"), at = 0, start = 0, end
    cdef long total = 0
    with nogil:
        while True:
            end = _run(buf, at, step, &start)
            if end == 0:
                break
            while fallocate(fd, 0, offset + <long>start, <long>(end - start)) < 0:
                if errno != EINTR:
                    total = -errno
                    break
            if total < 0:
                break
            total += <long>(end - start)
            at = end
    return total


def write_data(int fd, const uint8_t[::1] buf not None, long offset, unit):
    """Write every unit of ``buf`` that is not wholly zero to the file, leaving holes elsewhere.

    Returns the bytes written, or a negative errno.
    """
    cdef size_t step = _positive(unit, "unit"), at = 0, start = 0, end
    cdef long total = 0
    cdef ssize_t done
    with nogil:
        while total >= 0:
            end = _run(buf, at, step, &start)
            if end == 0:
                break
            at = end
            while start < end:
                done = pwrite(fd, &buf[start], end - start, offset + <long>start)
                if done > 0:
                    start += <size_t>done
                    total += done
                elif done == 0:
                    total = -EIO
                    break
                elif errno != EINTR:
                    total = -errno
                    break
    return total


def punch_zeros(int fd, const uint8_t[::1] buf not None, long offset, unit):
    """Give back the blocks of every unit of ``buf`` that is wholly zero; it lies at ``offset``.

    Returns 0 or a negative errno.
    """
    cdef size_t step = _positive(unit, "unit"), at = 0, start = 0, end, n = <size_t>buf.shape[0]
    cdef int result = 0
    with nogil:
        while at < n and result == 0:
            end = _run(buf, at, step, &start)
            if end == 0:
                start = end = n
            while start > at and rm_punch(fd, offset + <long>at, <long>(start - at)) < 0:
                if errno != EINTR:
                    result = -errno
                    break
            at = end
    return result


def read_data(int fd, uint8_t[::1] buf not None, long offset, int64_t[::1] extent=None):
    """Read the file's data extents from ``offset`` into ``buf``; where it has holes, touch nothing.

    ``extent`` is kept by who reads a file bit by bit: two words, where the last extent that was
    found begins and ends, at first 0. A file in memory finds the end of one by walking over its
    pages, which must not be done for each bit anew.

    Returns the bytes read (0: all of it is a hole), or a negative errno: ``-EIO`` when the file
    ends before the buffer does. A file system that knows no holes is read in full.
    """
    cdef long n = <long>buf.shape[0], at = 0, end, total = 0, found
    cdef ssize_t done
    cdef int64_t own[2]
    cdef int64_t *known = own
    own[0] = own[1] = 0
    if extent is not None:
        if extent.shape[0] < 2:
            raise ValueError("no room for the extent")
        known = &extent[0]
    with nogil:
        while at < n:
            found = offset + at
            if not known[0] <= found < known[1]:
                found = lseek(fd, found, SEEK_DATA)
            if found < 0 and errno == ENXIO:
                # No data from here on. What lies behind the file's end is no hole, though.
                if lseek(fd, 0, 2) < offset + n:
                    total = -EIO
                break
            if found < 0 and errno == EINVAL:
                found = offset + at
                end = offset + n
            elif found < 0:
                total = -errno
                break
            else:
                if found >= offset + n:
                    break
                if not known[0] <= found < known[1]:
                    end = lseek(fd, found, SEEK_HOLE)
                    if end < 0:
                        total = -errno
                        break
                    known[0] = found
                    known[1] = end
                end = known[1]
            at = found - offset
            end -= offset
            if end > n:
                end = n
            while at < end:
                done = pread(fd, &buf[at], <size_t>(end - at), offset + at)
                if done > 0:
                    at += done
                    total += done
                elif done == 0:
                    total = -EIO
                    break
                elif errno != EINTR:
                    total = -errno
                    break
            if total < 0:
                break
    return total


def reserve_space(int fd, long offset, long length):
    """Have the file system set blocks aside for this range, the file's size unchanged.

    Returns 0 or a negative errno (``-EOPNOTSUPP`` where the file system cannot reserve).
    """
    cdef int result = 0
    with nogil:
        while rm_reserve(fd, offset, length) < 0:
            if errno != EINTR:
                result = -errno
                break
    return result


def start_writeback(int fd, long offset, long length):
    """Ask the kernel to begin writing this range to the disk; a hint, failures are ignored."""
    with nogil:
        rm_start_writeback(fd, offset, length)
