/* SPDX-License-Identifier: Apache-2.0
 *
 * A writer of memory at full speed, and what finds a write that a dirty tracker has lost.
 *
 * The first word of each page is its generation. Once a write is complete (and marked, where marks
 * are explicit), `done` has its generation: so a copy of the pages that an exchange found must be as
 * new as what `done` said before that exchange.
 */
#include <sched.h>
#include <stdint.h>
#include <stddef.h>

#define PAGE 4096

struct control {
    int stop, pause, paused;
    uint64_t writes;
};

static uint64_t *word_of(unsigned char *ram, uint64_t page)
{
    return (uint64_t *)(ram + page * PAGE);
}

void write_pages(unsigned char *ram, uint64_t pages, uint64_t *marks, uint64_t *done,
                 struct control *control)
{
    uint64_t x = 88172645463325252ull;
    while (!__atomic_load_n(&control->stop, __ATOMIC_ACQUIRE)) {
        if (__atomic_load_n(&control->pause, __ATOMIC_ACQUIRE)) {
            __atomic_store_n(&control->paused, 1, __ATOMIC_RELEASE);
            while (__atomic_load_n(&control->pause, __ATOMIC_ACQUIRE))
                sched_yield();
            __atomic_store_n(&control->paused, 0, __ATOMIC_RELEASE);
        }
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        uint64_t page = x % pages, generation = done[page] + 1;
        __atomic_store_n(word_of(ram, page), generation, __ATOMIC_RELAXED);
        if (marks)
            __atomic_fetch_or(&marks[page / 64], 1ull << page % 64, __ATOMIC_SEQ_CST);
        __atomic_store_n(&done[page], generation, __ATOMIC_RELEASE);
        __atomic_fetch_add(&control->writes, 1, __ATOMIC_RELAXED);
    }
}

/* Bytes that go to and fro between two values, all over the pages. */
void flip_bytes(unsigned char *ram, uint64_t pages, struct control *control)
{
    uint64_t x = 88172645463325252ull;
    while (!__atomic_load_n(&control->stop, __ATOMIC_ACQUIRE)) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        __atomic_fetch_xor(ram + x % (pages * PAGE), 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&control->writes, 1, __ATOMIC_RELAXED);
    }
}

void note_done(const uint64_t *done, uint64_t *before, uint64_t pages)
{
    for (uint64_t page = 0; page < pages; page++)
        before[page] = __atomic_load_n(&done[page], __ATOMIC_ACQUIRE);
}

/* Copy the pages that are dirty; return the first page whose copy is too old, or -1. */
int64_t copy_and_check(unsigned char *ram, uint64_t pages, const uint64_t *dirty, uint64_t *copy,
                       const uint64_t *before)
{
    int64_t lost = -1;
    for (uint64_t page = 0; page < pages; page++) {
        if (dirty[page / 64] >> page % 64 & 1)
            copy[page] = __atomic_load_n(word_of(ram, page), __ATOMIC_RELAXED);
        if (copy[page] < before[page] && lost < 0)
            lost = (int64_t)page;
    }
    return lost;
}
