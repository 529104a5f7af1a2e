# SPDX-License-Identifier: Apache-2.0
# XBZRLE: a page as what has changed in it, and the cache of pages that tells what that is.
#
# Wire: docs/protocol.md, pages in the stream.

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    /* ULEB128 of two bytes at most: 14 bits. */
    #define RM_ULEB_MAX 0x3fff

    static size_t rm_put_uleb(unsigned char *d, size_t value)
    {
        if (value < 128) {
            d[0] = (unsigned char)value;
            return 1;
        }
        d[0] = (unsigned char)(value & 127) | 128;
        d[1] = (unsigned char)(value >> 7);
        return 2;
    }

    /* The caller knows that two bytes are there. 0: the second one claims that there is a third. */
    static size_t rm_get_uleb(const unsigned char *s, size_t *value)
    {
        *value = s[0] & 127u;
        if (s[0] < 128)
            return 1;
        *value |= (size_t)s[1] << 7;
        return s[1] < 128 ? 2 : 0;
    }

    static uint64_t rm_xor(const unsigned char *a, const unsigned char *b)
    {
        uint64_t x, y;
        memcpy(&x, a, 8);
        memcpy(&y, b, 8);
        return x ^ y;
    }

    /* The byte in memory order that the lowest (little endian: trailing) set bit lies in. */
    static size_t rm_first_byte(uint64_t bits)
    {
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        return (size_t)__builtin_ctzll(bits) / 8;
    #else
        return (size_t)__builtin_clzll(bits) / 8;
    #endif
    }

    /* Where the two differ first, at or after `at`; n if nowhere. */
    static size_t rm_next_difference(const unsigned char *a, const unsigned char *b, size_t at,
                                     size_t n)
    {
        uint64_t bits;
        while (n - at >= 32) {
            if (rm_xor(a + at, b + at) | rm_xor(a + at + 8, b + at + 8) |
                rm_xor(a + at + 16, b + at + 16) | rm_xor(a + at + 24, b + at + 24))
                break;
            at += 32;
        }
        while (n - at >= 8) {
            if ((bits = rm_xor(a + at, b + at)))
                return at + rm_first_byte(bits);
            at += 8;
        }
        while (at < n && a[at] == b[at])
            at++;
        return at;
    }

    /* Where the two are equal first, at or after `at`; n if nowhere. */
    static size_t rm_next_equality(const unsigned char *a, const unsigned char *b, size_t at,
                                   size_t n)
    {
        while (n - at >= 8) {
            uint64_t x = rm_xor(a + at, b + at);
            /* The top bit of each byte that is zero, and of no other. */
            uint64_t low = 0x7f7f7f7f7f7f7f7full;
            uint64_t zeros = ~(((x & low) + low) | x | low);
            if (zeros)
                return at + rm_first_byte(zeros);
            at += 8;
        }
        while (at < n && a[at] != b[at])
            at++;
        return at;
    }

    /* Bytes written; 0 when old and new are equal; -1 when `room` does not hold it. */
    static int rm_xbzrle_encode(const unsigned char *old, const unsigned char *new_, size_t n,
                                unsigned char *d, size_t room)
    {
        size_t at = 0, out = 0;
        for (;;) {
            size_t start = rm_next_difference(old, new_, at, n);
            if (start == n)
                return (int)out;
            size_t end = rm_next_equality(old, new_, start + 1, n);
            size_t same = start - at, literal = end - start;
            if (literal + 1 + (same > 127) + 1 + (literal > 127) > room - out)
                return -1;
            out += rm_put_uleb(d + out, same);
            out += rm_put_uleb(d + out, literal);
            memcpy(d + out, new_ + start, literal);
            out += literal;
            at = end;
        }
    }

    /* How far into the page it came; -1 when it is broken, the page half patched then. */
    static int rm_xbzrle_decode(const unsigned char *s, size_t n, unsigned char *page, size_t size)
    {
        size_t at = 0, in = 0, count, used;
        while (in < n) {
            int first = in == 0;
            if (n - in < 2 || !(used = rm_get_uleb(s + in, &count)))
                return -1;
            in += used;
            if ((count == 0 && !first) || count > size - at)
                return -1;
            at += count;
            if (n - in < 2 || !(used = rm_get_uleb(s + in, &count)))
                return -1;
            in += used;
            if (count == 0 || count > size - at || count > n - in)
                return -1;
            memcpy(page + at, s + in, count);
            at += count;
            in += count;
        }
        return (int)at;
    }
    """
    enum: RM_ULEB_MAX
    int rm_xbzrle_encode(
        const uint8_t *old, const uint8_t *new_, size_t n, uint8_t *d, size_t room) nogil
    int rm_xbzrle_decode(const uint8_t *s, size_t n, uint8_t *page, size_t size) nogil


def xbzrle_encode_buffer(
    const uint8_t[::1] old not None, const uint8_t[::1] new not None, uint8_t[::1] dst not None
):
    """Encode what is different in ``new`` into ``dst``, as XBZRLE.

    Returns:
        The encoded length; 0 when nothing is different; -1 when ``dst`` does not hold it.

    Raises:
        ValueError: buffers of different or no length, or of more than the 16383 bytes that a run
            length can tell.
    """
    cdef size_t n = <size_t>new.shape[0]
    cdef int result
    if old.shape[0] != new.shape[0] or not 0 < n <= RM_ULEB_MAX:
        raise ValueError(f"XBZRLE of {old.shape[0]} and {new.shape[0]} bytes")
    if dst.shape[0] == 0:
        return -1 if memcmp(&old[0], &new[0], n) else 0
    with nogil:
        result = rm_xbzrle_encode(&old[0], &new[0], n, &dst[0], <size_t>dst.shape[0])
    return result


def xbzrle_decode_buffer(const uint8_t[::1] src not None, uint8_t[::1] dst not None):
    """Patch ``dst``, which holds the old page, as the XBZRLE in ``src`` says.

    Returns:
        How many bytes of ``dst`` the encoding reached; -1 when it is broken or would leave either
        buffer. Then some of ``dst`` may have been patched.
    """
    cdef int result
    if src.shape[0] == 0:
        return 0
    if dst.shape[0] == 0:
        return -1
    with nogil:
        result = rm_xbzrle_decode(
            &src[0], <size_t>src.shape[0], &dst[0], <size_t>dst.shape[0])
    return result


cdef class PageCache:
    """Pages as the destination has them: what XBZRLE encodes new ones against.

    Each address has one slot, where it may stand. A page keeps its slot from others for as long as
    it was sent in this round of the migration or in the one before. Not for two threads at a time.

    Args:
        pages: how many it holds at most, a power of two.
        page: bytes of a page.

    Raises:
        MemoryError: there is no room for it. Memory is taken as it fills.
    """

    cdef size_t slots, page
    cdef uint64_t *keys      # address + 1; 0 where nothing is
    cdef uint64_t *ages      # the round in which it was sent last
    cdef uint8_t *data
    cdef uint8_t *scratch    # a page that nobody writes while it is encoded

    def __cinit__(self, size_t pages, size_t page):
        if pages == 0 or pages & (pages - 1) or page == 0 or page > RM_ULEB_MAX:
            raise ValueError(f"a cache of {pages} pages of {page} bytes")
        self.slots = pages
        self.page = page
        self.keys = <uint64_t *>calloc(pages, sizeof(uint64_t))
        self.ages = <uint64_t *>calloc(pages, sizeof(uint64_t))
        self.data = <uint8_t *>calloc(pages, page)
        self.scratch = <uint8_t *>malloc(page)
        if not (self.keys and self.ages and self.data and self.scratch):
            raise MemoryError(f"a cache of {pages} pages")

    def __dealloc__(self):
        free(self.keys)
        free(self.ages)
        free(self.data)
        free(self.scratch)

    def take_over(self, PageCache other not None):
        """Take the pages of another cache, the youngest where two meet in one slot."""
        cdef size_t slot, mine
        cdef uint64_t key
        if other.page != self.page:
            raise ValueError(f"pages of {other.page} bytes for a cache of {self.page}")
        with nogil:
            for slot in range(other.slots):
                key = other.keys[slot]
                if key == 0:
                    continue
                mine = self.slot(key - 1)
                if self.keys[mine] == 0 or self.ages[mine] < other.ages[slot]:
                    self.keys[mine] = key
                    self.ages[mine] = other.ages[slot]
                    memcpy(self.data + mine * self.page, other.data + slot * self.page, self.page)

    def clear(self):
        """Forget all pages."""
        with nogil:
            memset(self.keys, 0, self.slots * sizeof(uint64_t))

    def __len__(self):
        cdef size_t slot, count = 0
        with nogil:
            for slot in range(self.slots):
                count += self.keys[slot] != 0
        return count

    cdef size_t slot(self, uint64_t address) noexcept nogil:
        return <size_t>(address // self.page) & (self.slots - 1)

    cdef uint8_t *find(self, uint64_t address) noexcept nogil:
        cdef size_t slot = self.slot(address)
        return self.data + slot * self.page if self.keys[slot] == address + 1 else NULL

    # The page was sent as `content` (NULL: as zeros) in round `age`.
    cdef void put(self, uint64_t address, const uint8_t *content, uint64_t age) noexcept nogil:
        cdef size_t slot = self.slot(address)
        cdef uint8_t *here = self.data + slot * self.page
        if self.keys[slot] != address + 1 and self.keys[slot] and age < self.ages[slot] + 2:
            return
        self.keys[slot] = address + 1
        self.ages[slot] = age
        if content == NULL:
            memset(here, 0, self.page)
        else:
            memcpy(here, content, self.page)

    cdef void drop(self, uint64_t address) noexcept nogil:
        cdef size_t slot = self.slot(address)
        if self.keys[slot] == address + 1:
            self.keys[slot] = 0
