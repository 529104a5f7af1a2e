/* SPDX-License-Identifier: Apache-2.0
 *
 * A thread that dirties memory at a pace, as the guest of paced.S does: `burst` pages every
 * `interval` nanoseconds, one after the other and over and over, each with the number of the pass
 * in its first word. It catches up with what it could not do in time, unless that is more than
 * `slack` behind. One of them in a process.
 */
#include <pthread.h>
#include <stdint.h>
#include <time.h>

#define PAGE 4096
#define NAP 4000000L /* nanoseconds, as the other one's timer ticks */

/* What may be seen while it runs: pages, and nanoseconds of CLOCK_MONOTONIC. */
struct seen {
    uint64_t written; /* pages so far; says where it goes on, too */
    uint64_t first;   /* when it began to write after it was let go on */
    uint64_t last;    /* when it was held */
};

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t go_on = PTHREAD_COND_INITIALIZER;
static int held = 1, over;
static struct seen seen;

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void write_burst(unsigned char *ram, uint64_t pages, uint64_t burst, uint64_t *marks)
{
    for (uint64_t end = seen.written + burst; seen.written < end; seen.written++) {
        uint64_t page = seen.written % pages;
        *(volatile uint32_t *)(ram + page * PAGE) = (uint32_t)(seen.written / pages + 1);
        /* Behind the write: a mark that is set before could be taken before it. */
        __atomic_fetch_or(&marks[page / 64], 1ull << page % 64, __ATOMIC_SEQ_CST);
    }
}

/* Write until `finish`; held at first. */
void run(unsigned char *ram, uint64_t pages, uint64_t burst, uint64_t interval, uint64_t slack,
         uint64_t *marks)
{
    const struct timespec nap = {0, NAP};
    uint64_t next = 0;
    for (;;) {
        pthread_mutex_lock(&gate);
        while (__atomic_load_n(&held, __ATOMIC_RELAXED) && !over)
            pthread_cond_wait(&go_on, &gate);
        int stop = over;
        uint64_t now = clock_ns();
        int due = now >= next;
        if (!stop && due) {
            if (now - next > slack)
                next = now;
            next += interval;
            if (!seen.first)
                seen.first = now;
            write_burst(ram, pages, burst, marks);
        }
        pthread_mutex_unlock(&gate);
        if (stop)
            return;
        if (!due)
            nanosleep(&nap, NULL);
    }
}

/* When this returns nothing is written any more. */
void hold(void)
{
    /* Before the lock: a writer that catches up has it nearly all the time, but for a look here. */
    __atomic_store_n(&held, 1, __ATOMIC_RELAXED);
    pthread_mutex_lock(&gate);
    seen.last = clock_ns();
    pthread_mutex_unlock(&gate);
}

void let(void)
{
    pthread_mutex_lock(&gate);
    seen.first = 0;
    held = 0;
    pthread_cond_signal(&go_on);
    pthread_mutex_unlock(&gate);
}

void finish(void)
{
    pthread_mutex_lock(&gate);
    over = 1;
    pthread_cond_signal(&go_on);
    pthread_mutex_unlock(&gate);
}

void look(struct seen *into)
{
    pthread_mutex_lock(&gate);
    *into = seen;
    pthread_mutex_unlock(&gate);
}

/* Go on behind so many pages; while it is held. */
void place(uint64_t written)
{
    pthread_mutex_lock(&gate);
    seen.written = written;
    pthread_mutex_unlock(&gate);
}
