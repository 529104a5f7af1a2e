# SPDX-License-Identifier: Apache-2.0
"""What more than one extension does with a page, small enough to be inlined into each."""

from libc.stdint cimport uint8_t, uint64_t


cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <stdint.h>
    #include <string.h>
    #include <unistd.h>

    /* Where the compiler and the C library can choose when the program is loaded, the widest
       registers that this processor has: memory is read no faster than that. */
    #if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
    #define RM_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
    #else
    #define RM_WIDEST
    #endif

    /* A data page mostly shows itself in its first bytes, a zero page must be read to its end:
       so blocks of 512 bytes, each a plain OR that the compiler vectorises, with a way out after
       each. memcpy because a slice may begin at any address. */
    RM_WIDEST static int rm_is_zero(const unsigned char *p, size_t n)
    {
        while (n >= 512) {
            uint64_t w[64], any = 0;
            memcpy(w, p, sizeof w);
            for (int i = 0; i < 64; i++)
                any |= w[i];
            if (any)
                return 0;
            p += 512;
            n -= 512;
        }
        while (n--)
            if (*p++)
                return 0;
        return 1;
    }

    /* First bit at or after `from` that is set (flip 0) or clear (flip all ones); `end` if none. */
    static uint64_t rm_next_bit(const uint64_t *w, uint64_t from, uint64_t end, uint64_t flip)
    {
        while (from < end) {
            uint64_t word = (w[from / 64] ^ flip) >> (from % 64);
            if (word) {
                from += (uint64_t)__builtin_ctzll(word);
                return from < end ? from : end;
            }
            from = (from / 64 + 1) * 64;
        }
        return end;
    }
    """
    int SEEK_DATA
    int SEEK_HOLE
    long lseek(int fd, long offset, int whence) nogil
    int rm_is_zero(const uint8_t *p, size_t n) nogil
    uint64_t rm_next_bit(const uint64_t *w, uint64_t start, uint64_t end, uint64_t flip) nogil
