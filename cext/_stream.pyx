# SPDX-License-Identifier: Apache-2.0
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Pages in the migration stream, without the GIL: page records, and XBZRLE (xbzrle.pxi).

What a peer sent is checked here byte by byte; what is wrong with it is returned as a status, and
put into words by rdma_mig.memory.page_stream, which knows the blocks by name.

Wire: docs/protocol.md, pages in the stream.
"""

from libc.errno cimport ENXIO, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from pages cimport SEEK_DATA, SEEK_HOLE, lseek, rm_is_zero, rm_next_bit

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    static uint64_t rm_get_be64(const unsigned char *s)
    {
        uint64_t value = 0;
        for (int i = 0; i < 8; i++)
            value = value << 8 | s[i];
        return value;
    }

    static void rm_put_be64(unsigned char *d, uint64_t value)
    {
        for (int i = 7; i >= 0; i--, value >>= 8)
            d[i] = (unsigned char)value;
    }

    /* A store that changes nothing would still allocate the page. */
    static void rm_fill(unsigned char *p, int byte, size_t n)
    {
        if (byte || !rm_is_zero(p, n))
            memset(p, byte, n);
    }
    """
    uint64_t rm_get_be64(const uint8_t *s) nogil
    void rm_put_be64(uint8_t *d, uint64_t value) nogil
    void rm_fill(uint8_t *p, int byte, size_t n) nogil

include "xbzrle.pxi"

# Flags of a page word (migration.h calls them RAM_SAVE_FLAG_*; rdma_mig.wire has them all).
cdef enum:
    ZERO = 0x02
    PAGE = 0x08
    CONTINUE = 0x20
    XBZRLE = 0x40
    COMPRESS_PAGE = 0x100
    OF_A_PAGE = ZERO | PAGE | CONTINUE | XBZRLE | COMPRESS_PAGE

# The one encoding that an XBZRLE record can have.
cdef enum:
    ENCODING_XBZRLE = 1

# Why load_pages() stopped. Python sees them under the names below.
cdef enum:
    _INCOMPLETE
    _OTHER_WORD
    _OTHER_BLOCK
    _NO_BLOCK
    _COMPRESSED
    _BAD_FLAGS
    _OUTSIDE
    _BAD_ENCODING
    _TOO_LONG
    _BAD_XBZRLE
    _NO_DECODED

INCOMPLETE = _INCOMPLETE
OTHER_WORD = _OTHER_WORD
OTHER_BLOCK = _OTHER_BLOCK
NO_BLOCK = _NO_BLOCK
COMPRESSED = _COMPRESSED
BAD_FLAGS = _BAD_FLAGS
OUTSIDE = _OUTSIDE
BAD_ENCODING = _BAD_ENCODING
TOO_LONG = _TOO_LONG
BAD_XBZRLE = _BAD_XBZRLE
NO_DECODED = _NO_DECODED


# What load_pages() and encode_pages() count, each at its index.
cdef enum:
    _NORMAL
    _DUPLICATE
    _XBZRLE_PAGES
    _XBZRLE_BYTES
    _UNCHANGED
    _OVERFLOW
    _CACHE_MISS
    _COUNTERS

NORMAL = _NORMAL
DUPLICATE = _DUPLICATE
XBZRLE_PAGES = _XBZRLE_PAGES
XBZRLE_BYTES = _XBZRLE_BYTES
UNCHANGED = _UNCHANGED
OVERFLOW = _OVERFLOW
CACHE_MISS = _CACHE_MISS
COUNTERS = _COUNTERS


def ram_handle_compressed(uint8_t[::1] host not None, int ch):
    """Fill ``host`` with the byte ``ch``, but store nothing where zeros would replace zeros.

    So private memory that was never written stays unallocated. Reading a hole of shared memory
    allocates it all the same; `load_pages` asks the file first.
    """
    cdef size_t n = <size_t>host.shape[0]
    if not 0 <= ch <= 255:
        raise ValueError(f"{ch} is not a byte")
    if n:
        with nogil:
            rm_fill(&host[0], ch, n)


cdef void _zero(uint8_t *ram, int fd, size_t start, size_t end, size_t page) noexcept nogil:
    # Make pages zero. Those that the file has as holes are, and are not touched: reading them
    # through the mapping would allocate them.
    cdef long found
    cdef size_t stop
    while start < end:
        stop = end
        if fd >= 0:
            found = lseek(fd, <long>start, SEEK_DATA)
            if found < 0 and errno == ENXIO or found >= <long>end:
                return
            if found >= 0:
                # One page, and then the file is asked again: to find where the data ends, a file
                # in memory would be walked page by page.
                start = <size_t>found - <size_t>found % page
                stop = min(start + page, end)
        while start < stop:
            rm_fill(ram + start, 0, page)
            start += page


def load_pages(const uint8_t[::1] data not None, size_t at, bytes name, uint8_t[::1] ram, int fd,
               size_t page, uint64_t[::1] counters not None, uint8_t[::1] decoded=None):
    """Take page records of one RAM block from ``data`` into its memory.

    Args:
        data: bytes of the stream.
        at: where in ``data`` the first record begins.
        name: of the block whose pages come now; None at the beginning, when there is none.
        ram: its memory.
        fd: the file that is mapped there from its beginning, which has holes where nothing was
            written; -1 for none.
        page: bytes of a page, a power of two.
        counters: COUNTERS words that are added to.
        decoded: room for a page, which an XBZRLE page is decoded in: RAM sees it when it is whole.
            Without it the first one is stopped at, for NO_DECODED.

    Returns:
        Where it stopped, and why: at an INCOMPLETE record, at a word that is not a page's, at a
        record that names another block, or at a record that is wrong.
    """
    cdef size_t n = <size_t>data.shape[0], length = 0, here, size, offset, name_length = 0
    cdef size_t zero_start = 0, zero_end = 0
    cdef uint64_t word, flags, kind
    cdef const uint8_t *d = NULL
    cdef uint8_t *memory = NULL
    cdef uint8_t *patched = NULL
    cdef const uint8_t *block = NULL
    cdef uint64_t *count
    cdef int stop = _INCOMPLETE
    if counters.shape[0] < _COUNTERS:
        raise ValueError("no room for the counters")
    count = &counters[0]
    if at > n:
        raise IndexError(f"records from byte {at} of {n}")
    if n:
        d = &data[0]
    if name is not None:
        block = name
        name_length = <size_t>len(name)
        length = <size_t>ram.shape[0]
        if length < page:
            raise ValueError(f"a RAM block of {length} bytes has no page")
        memory = &ram[0]
    if decoded is not None:
        if <size_t>decoded.shape[0] != page:
            raise ValueError(f"a page of {page} bytes is not decoded in {decoded.shape[0]}")
        patched = &decoded[0]
    with nogil:
        while n - at >= 8:
            word = rm_get_be64(d + at)
            flags = word & (page - 1)
            if not flags & OF_A_PAGE:
                stop = _OTHER_WORD
                break
            kind = flags & ~<uint64_t>CONTINUE
            if kind == COMPRESS_PAGE:
                stop = _COMPRESSED
                break
            if kind != ZERO and kind != PAGE and kind != XBZRLE:
                stop = _BAD_FLAGS
                break
            here = at + 8
            if flags & CONTINUE:
                if block == NULL:
                    stop = _NO_BLOCK
                    break
            else:
                if here == n or n - here - 1 < d[here]:
                    break
                size = d[here]
                if block == NULL or size != name_length or memcmp(d + here + 1, block, size):
                    stop = _OTHER_BLOCK
                    break
                here += 1 + size
            if word - flags > length - page:
                stop = _OUTSIDE
                break
            offset = <size_t>(word - flags)
            # Adjacent zero pages are one run, whose file is asked once; any other record ends it.
            if zero_end > zero_start and (kind != ZERO or offset != zero_end):
                _zero(memory, fd, zero_start, zero_end, page)
                zero_start = zero_end = 0
            if kind == ZERO:
                if here == n:
                    break
                if d[here]:
                    # No run to go on with, or it went on to this page.
                    if zero_end > zero_start:
                        _zero(memory, fd, zero_start, zero_end, page)
                        zero_start = zero_end = 0
                    memset(memory + offset, d[here], page)
                elif zero_end > zero_start:
                    zero_end += page
                else:
                    zero_start = offset
                    zero_end = offset + page
                here += 1
                count[_DUPLICATE] += 1
            elif kind == PAGE:
                if n - here < page:
                    break
                memcpy(memory + offset, d + here, page)
                here += page
                count[_NORMAL] += 1
            else:
                if n - here < 3:
                    break
                if d[here] != ENCODING_XBZRLE:
                    stop = _BAD_ENCODING
                    break
                size = <size_t>d[here + 1] << 8 | d[here + 2]
                if size > page:
                    stop = _TOO_LONG
                    break
                here += 3
                if n - here < size:
                    break
                if patched == NULL:
                    stop = _NO_DECODED
                    break
                memcpy(patched, memory + offset, page)
                if rm_xbzrle_decode(d + here, size, patched, page) < 0:
                    stop = _BAD_XBZRLE
                    break
                memcpy(memory + offset, patched, page)
                here += size
                count[_XBZRLE_PAGES] += 1
                count[_XBZRLE_BYTES] += here - at
            at = here
        if zero_end > zero_start:
            _zero(memory, fd, zero_start, zero_end, page)
    return at, stop


def encode_pages(const uint8_t[::1] ram not None, size_t first, const uint64_t[::1] dirty,
                 bytes name not None, int fd, uint64_t[::1] extent not None, size_t page,
                 uint8_t[::1] out not None, uint64_t[::1] counters not None,
                 PageCache cache=None, uint64_t address=0, uint64_t age=0, bint last=False):
    """Encode a RAM block's pages from page ``first`` on, until ``out`` is full or no page is left.

    The first record names the block, so what is in ``out`` can be loaded after any other.

    Args:
        ram: the block's memory, whole pages, which may be written meanwhile: a page that is torn
            by that has to be encoded again, so whoever writes must have it marked as dirty.
        first: the page to begin with.
        dirty: a bit for each page that is to be encoded; None for all.
        name: the block's.
        fd: the file that is mapped as ``ram`` from its beginning; what is a hole there is encoded
            as zero without being touched, which would allocate it. -1 for none.
        extent: two words, zeros at first, kept from call to call: the extent of the file that was
            found last.
        page: bytes of a page.
        out: room for at least one record.
        counters: COUNTERS words that are added to.
        cache: what the destination has; None for no XBZRLE.
        address: of the block in the cache, a multiple of ``page``.
        age: the round of the migration.
        last: what is sent now is not sent again, so that the cache need not learn it.

    Returns:
        Bytes written, and the page to go on with (the number of pages when done).
    """
    cdef size_t pages = <size_t>ram.shape[0] // page, used = 0
    cdef size_t name_length = <size_t>len(name), room = <size_t>out.shape[0], head
    cdef const uint8_t *block = name
    cdef const uint64_t *bits = NULL
    cdef const uint8_t *old
    cdef uint8_t *record
    cdef uint64_t at = first, offset, flags
    cdef uint64_t *count
    cdef long found
    cdef int size
    if name_length > 255 or room < 9 + name_length + 3 + page:
        raise ValueError(f"{room} bytes hold no page of {page} of block {name!r}")
    if dirty is not None:
        if <size_t>dirty.shape[0] * 64 < pages:
            raise ValueError(f"{dirty.shape[0]} words of dirty bits for {pages} pages")
        if pages:
            bits = &dirty[0]
    if extent.shape[0] < 2 or counters.shape[0] < _COUNTERS:
        raise ValueError("no room for the extent or the counters")
    if cache is not None and cache.page != page:
        raise ValueError(f"a cache for pages of {cache.page} bytes")
    count = &counters[0]
    with nogil:
        while at < pages:
            if bits != NULL:
                at = rm_next_bit(bits, at, pages, 0)
                if at >= pages:
                    break
            head = 8 if used else 9 + name_length
            if room - used < head + 3 + page:
                break
            offset = at * page
            at += 1
            if fd >= 0 and offset >= extent[1]:
                # Data from extent[0] to extent[1], and a hole before it from where we are.
                found = lseek(fd, <long>offset, SEEK_DATA)
                if found < 0:  # no more data, or a file that cannot tell
                    extent[0] = pages * page if errno == ENXIO else offset
                    extent[1] = pages * page
                else:
                    extent[0] = <uint64_t>found
                    found = lseek(fd, found, SEEK_HOLE)
                    extent[1] = <uint64_t>found if found > 0 else pages * page
            record = &out[used + head]
            if (fd >= 0 and offset + page <= extent[0]) or rm_is_zero(&ram[offset], page):
                flags = ZERO
                record[0] = 0
                size = 1
                count[_DUPLICATE] += 1
                if cache is not None:
                    if last:
                        cache.drop(address + offset)
                    else:
                        cache.put(address + offset, NULL, age)
            else:
                old = cache.find(address + offset) if cache is not None else NULL
                flags = PAGE
                if old != NULL:
                    # The guest may write while this reads: what is encoded, what the destination
                    # gets and what the cache keeps must be the same.
                    memcpy(cache.scratch, &ram[offset], page)
                    size = rm_xbzrle_encode(old, cache.scratch, page, record + 3, page)
                    if size == 0:
                        count[_UNCHANGED] += 1
                        cache.put(address + offset, cache.scratch, age)
                        continue
                    if size > 0:
                        flags = XBZRLE
                        record[0] = ENCODING_XBZRLE
                        record[1] = <uint8_t>(size >> 8)
                        record[2] = <uint8_t>(size & 255)
                        size += 3
                        count[_XBZRLE_PAGES] += 1
                        count[_XBZRLE_BYTES] += head + <size_t>size
                    else:
                        count[_OVERFLOW] += 1
                        memcpy(record, cache.scratch, page)
                else:
                    memcpy(record, &ram[offset], page)
                    if cache is not None:
                        count[_CACHE_MISS] += 1
                if flags == PAGE:
                    size = <int>page
                    count[_NORMAL] += 1
                if cache is not None:
                    if last:
                        # It is not what the destination has any more.
                        cache.drop(address + offset)
                    elif old == NULL:
                        cache.put(address + offset, record, age)
                    else:
                        cache.put(address + offset, cache.scratch, age)
            rm_put_be64(&out[used], offset | flags | (CONTINUE if used else 0))
            if not used:
                out[8] = <uint8_t>name_length
                memcpy(&out[9], block, name_length)
            used += head + <size_t>size
    return used, at
