# SPDX-License-Identifier: Apache-2.0
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Which pages were written: bitmaps that are exchanged, and what the kernel knows.

Bitmaps are as in rdma_mig._pages; words that two threads (or processes) share are only changed by
atomic operations here. Functions that make system calls return a negative errno, so that the caller
can say in one line what was tried.

Kernel: Documentation/admin-guide/mm/userfaultfd.rst, pagemap.rst and soft-dirty.rst.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

from pages cimport rm_next_bit

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/types.h>
    #include <linux/userfaultfd.h>
    #include <poll.h>
    #include <pthread.h>
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* What the kernel has and the headers of an older system lack. */
    #ifndef UFFD_USER_MODE_ONLY
    #define UFFD_USER_MODE_ONLY 1
    #endif
    #ifndef USERFAULTFD_IOC_NEW
    #define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
    #endif
    #define RM_FEATURE_WP_SHMEM (1u << 12)
    #define RM_FEATURE_WP_ASYNC (1u << 15)

    struct rm_scan {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t inverted, mask, anyof, returned;
    };
    struct rm_region {
        uint64_t start, end, categories;
    };
    #define RM_PAGEMAP_SCAN _IOWR('f', 16, struct rm_scan)
    #define RM_SCAN_WP_MATCHING 1
    #define RM_SCAN_CHECK_WPASYNC 2
    #define RM_PAGE_IS_WRITTEN 2
    #define RM_PAGEMAP_SOFT_DIRTY (1ull << 55)

    static void rm_atomic_or(uint64_t *word, uint64_t bits)
    {
        __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST);
    }

    static uint64_t rm_atomic_take(uint64_t *word)
    {
        return __atomic_load_n(word, __ATOMIC_ACQUIRE)
            ? __atomic_exchange_n(word, 0, __ATOMIC_SEQ_CST) : 0;
    }

    static void rm_atomic_set(int *flag)
    {
        __atomic_store_n(flag, 1, __ATOMIC_SEQ_CST);
    }

    static int rm_atomic_get(int *flag)
    {
        return __atomic_load_n(flag, __ATOMIC_SEQ_CST);
    }

    static uint64_t rm_bits(uint64_t word)
    {
        return (uint64_t)__builtin_popcountll(word);
    }

    static int rm_uffd_api(int fd, uint64_t features)
    {
        struct uffdio_api api = {.api = UFFD_API, .features = features};
        if (ioctl(fd, UFFDIO_API, &api) == 0)
            return fd;
        int error = errno;
        close(fd);
        return -error;
    }

    /* A userfaultfd with these features. One that sees only what user mode touches is open to
       everybody; others to CAP_SYS_PTRACE, by a sysctl, and to who may open the device. */
    static int rm_uffd(uint64_t features, int user_mode_suffices)
    {
        int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
        if (fd < 0 && errno == EPERM) {
            int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
            errno = EPERM;
            if (device >= 0) {
                fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
                close(device);
            }
        }
        if (fd < 0 && user_mode_suffices)
            fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
        return fd < 0 ? -errno : rm_uffd_api(fd, features);
    }

    static int rm_uffd_register(int fd, uint64_t start, uint64_t length)
    {
        struct uffdio_register what = {
            .range = {.start = start, .len = length}, .mode = UFFDIO_REGISTER_MODE_WP};
        if (ioctl(fd, UFFDIO_REGISTER, &what))
            return -errno;
        return what.ioctls & (1ull << _UFFDIO_WRITEPROTECT) ? 0 : -EOPNOTSUPP;
    }

    static int rm_uffd_unregister(int fd, uint64_t start, uint64_t length)
    {
        struct uffdio_range what = {.start = start, .len = length};
        return ioctl(fd, UFFDIO_UNREGISTER, &what) ? -errno : 0;
    }

    /* Protect, or let write again and wake who waits. EAGAIN: the address space is changing. */
    static int rm_uffd_protect(int fd, uint64_t start, uint64_t length, int on)
    {
        struct uffdio_writeprotect what = {
            .range = {.start = start, .len = length}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
        while (ioctl(fd, UFFDIO_WRITEPROTECT, &what))
            if (errno != EAGAIN && errno != EINTR)
                return -errno;
        return 0;
    }

    /* The address of the write that waits, 0 for another event; or a negative errno. */
    static int rm_uffd_next(int fd, uint64_t *address)
    {
        struct uffd_msg message;
        ssize_t got = read(fd, &message, sizeof message);
        if (got < 0)
            return -errno;
        if (got != sizeof message)
            return -EIO;
        *address = message.event == UFFD_EVENT_PAGEFAULT ? message.arg.pagefault.address : 0;
        return 0;
    }

    /* 1: there is something to read; 0: woken to stop. */
    static int rm_uffd_wait(int fd, int wake)
    {
        struct pollfd both[] = {{.fd = fd, .events = POLLIN}, {.fd = wake, .events = POLLIN}};
        for (;;) {
            if (poll(both, 2, -1) < 0) {
                if (errno != EINTR)
                    return -errno;
            } else if (both[1].revents) {
                return 0;
            } else if (both[0].revents & POLLIN) {
                return 1;
            } else if (both[0].revents) {
                return -EIO;
            }
        }
    }

    /* Regions that were written, which are protected again in the same step. */
    static long rm_scan_written(int fd, uint64_t *at, uint64_t end, struct rm_region *out,
                                uint64_t n)
    {
        struct rm_scan scan = {
            .size = sizeof scan, .flags = RM_SCAN_WP_MATCHING | RM_SCAN_CHECK_WPASYNC,
            .start = *at, .end = end, .vec = (uint64_t)(uintptr_t)out, .vec_len = n,
            .mask = RM_PAGE_IS_WRITTEN, .returned = RM_PAGE_IS_WRITTEN};
        long found = ioctl(fd, RM_PAGEMAP_SCAN, &scan);
        if (found < 0)
            return -errno;
        *at = scan.walk_end;
        return found;
    }
    """
    enum: RM_FEATURE_WP_SHMEM
    enum: RM_FEATURE_WP_ASYNC
    enum: RM_PAGEMAP_SOFT_DIRTY
    struct rm_region:
        uint64_t start
        uint64_t end
    void rm_atomic_or(uint64_t *word, uint64_t bits) nogil
    uint64_t rm_atomic_take(uint64_t *word) nogil
    void rm_atomic_set(int *flag) nogil
    int rm_atomic_get(int *flag) nogil
    uint64_t rm_bits(uint64_t word) nogil
    int rm_uffd(uint64_t features, int user_mode_suffices) nogil
    int rm_uffd_register(int fd, uint64_t start, uint64_t length) nogil
    int rm_uffd_unregister(int fd, uint64_t start, uint64_t length) nogil
    int rm_uffd_protect(int fd, uint64_t start, uint64_t length, int on) nogil
    int rm_uffd_next(int fd, uint64_t *address) nogil
    int rm_uffd_wait(int fd, int wake) nogil
    long rm_scan_written(
        int fd, uint64_t *at, uint64_t end, rm_region *out, uint64_t n) nogil
    int MADV_NOHUGEPAGE
    int madvise(void *address, size_t length, int advice) nogil
    int mlock(const void *address, size_t length) nogil
    int munlock(const void *address, size_t length) nogil
    ssize_t pread(int fd, void *data, size_t length, long offset) nogil

    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) nogil
    int pthread_mutex_destroy(pthread_mutex_t *mutex) nogil
    int pthread_mutex_lock(pthread_mutex_t *mutex) nogil
    int pthread_mutex_unlock(pthread_mutex_t *mutex) nogil

FEATURE_WP_SHMEM = RM_FEATURE_WP_SHMEM
FEATURE_WP_ASYNC = RM_FEATURE_WP_ASYNC


cdef uint64_t _mask(uint64_t first, uint64_t end) noexcept nogil:
    # Bits of the word that `first` is in, from there to `end` (not included) or the word's end.
    cdef uint64_t bit = first & 63, count = end - first
    if count >= 64 - bit:
        count = 64 - bit
    return ((<uint64_t>0xffffffffffffffff) >> (64 - count)) << bit


def mark(uint64_t[::1] words not None, first, count):
    """Set ``count`` bits from ``first``, each word atomically: after the pages were written."""
    cdef uint64_t at = first, end = at + <uint64_t>count
    if end < at or end > <uint64_t>words.shape[0] * 64:
        raise IndexError(f"{count} pages from {first} in a bitmap of {words.shape[0] * 64}")
    with nogil:
        while at < end:
            rm_atomic_or(&words[<Py_ssize_t>(at >> 6)], _mask(at, end))
            at = (at | 63) + 1


def take(uint64_t[::1] words not None, uint64_t[::1] into not None):
    """Move the bits that are set to ``into``, each word by one atomic exchange.

    Returns:
        How many were set in ``words``.
    """
    cdef Py_ssize_t i, n = words.shape[0]
    cdef uint64_t word, count = 0
    if into.shape[0] < n:
        raise IndexError(f"{n} words into {into.shape[0]}")
    with nogil:
        for i in range(n):
            word = rm_atomic_take(&words[i])
            if word:
                into[i] |= word
                count += rm_bits(word)
    return count


def uffd_open(uint64_t features, bint user_mode_suffices):
    """Open a userfaultfd with these features.

    Args:
        features: of FEATURE_WP_SHMEM and FEATURE_WP_ASYNC.
        user_mode_suffices: one that does not hear of the kernel's own accesses will do.

    Returns:
        The descriptor, or a negative errno: ``-EINVAL`` where the kernel lacks a feature,
        ``-EPERM`` where it is not for us, ``-ENOSYS`` where there is no userfaultfd.
    """
    cdef int result
    with nogil:
        result = rm_uffd(features, user_mode_suffices)
    return result


def uffd_register(int fd, uint64_t address, uint64_t length):
    """Have writes to these pages reported, once they are protected; 0 or a negative errno."""
    cdef int result
    with nogil:
        result = rm_uffd_register(fd, address, length)
    return result


def uffd_unregister(int fd, uint64_t address, uint64_t length):
    """Let these pages be written freely again, by who waits too; 0 or a negative errno."""
    cdef int result
    with nogil:
        result = rm_uffd_unregister(fd, address, length)
    return result


def uffd_protect(int fd, uint64_t address, uint64_t length):
    """Protect these pages from being written; 0 or a negative errno."""
    cdef int result
    with nogil:
        result = rm_uffd_protect(fd, address, length, 1)
    return result


# Regions that one call to the kernel may report.
cdef enum:
    REGIONS = 512


def scan_written(int fd, uint64_t address, uint64_t[::1] into not None, uint64_t pages,
                 size_t page):
    """Mark the pages that were written since they were protected, and protect them again.

    Each page is found and protected in one step, so no write falls in between.

    Args:
        fd: /proc/self/pagemap.
        address: of the first page, which bit 0 stands for.
        into: bitmap that is added to.
        pages: how many.
        page: bytes of a page.

    Returns:
        How many pages were found, or a negative errno: ``-ENOTTY`` where the kernel cannot.
    """
    cdef rm_region regions[REGIONS]
    cdef uint64_t at = address, end = address + pages * page, first, last, total = 0
    cdef long found = 0, i
    if pages > <uint64_t>into.shape[0] * 64:
        raise IndexError(f"{pages} pages in a bitmap of {into.shape[0] * 64}")
    with nogil:
        while at < end:
            found = rm_scan_written(fd, &at, end, regions, REGIONS)
            if found < 0:
                break
            for i in range(found):
                first = (regions[i].start - address) // page
                last = (regions[i].end - address) // page
                total += last - first
                while first < last:
                    into[<Py_ssize_t>(first >> 6)] |= _mask(first, last)
                    first = (first | 63) + 1
    return found if found < 0 else total


def read_soft_dirty(int fd, uint64_t address, uint64_t[::1] into not None, uint64_t pages,
                    size_t page):
    """Mark the pages whose soft-dirty bit is set; they stay so until the bits are cleared.

    Args:
        fd: /proc/self/pagemap.
        address: of the first page, which bit 0 stands for.
        into: bitmap that is added to.
        pages: how many.
        page: bytes of a page of this host.

    Returns:
        How many pages were found, or a negative errno.
    """
    cdef uint64_t entries[REGIONS]
    cdef uint64_t at = 0, want, i, total = 0
    cdef ssize_t got = 0
    if pages > <uint64_t>into.shape[0] * 64:
        raise IndexError(f"{pages} pages in a bitmap of {into.shape[0] * 64}")
    with nogil:
        while at < pages:
            want = REGIONS if pages - at > REGIONS else pages - at
            got = pread(fd, entries, want * 8, <long>((address // page + at) * 8))
            if got < 0:
                if errno == EINTR:
                    continue
                got = -errno
                break
            if got == 0:
                got = -EAGAIN
                break
            for i in range(<uint64_t>got // 8):
                if entries[i] & RM_PAGEMAP_SOFT_DIRTY:
                    into[<Py_ssize_t>((at + i) >> 6)] |= (<uint64_t>1) << ((at + i) & 63)
                    total += 1
            at += <uint64_t>got // 8
    return got if got < 0 else total


def pin_mapping(uint64_t address, uint64_t length):
    """Keep the kernel from taking pages out of this mapping; 0 or a negative errno.

    They are locked, which reads all of them in, and not made into huge pages.
    """
    cdef int result = 0
    with nogil:
        # A kernel without huge pages refuses the advice, and does not need it.
        madvise(<void *><uintptr_t>address, length, MADV_NOHUGEPAGE)
        if mlock(<void *><uintptr_t>address, length):
            result = -errno
    return result


def unpin_mapping(uint64_t address, uint64_t length):
    """Undo `pin_mapping`'s lock; 0 or a negative errno."""
    cdef int result = 0
    with nogil:
        if munlock(<void *><uintptr_t>address, length):
            result = -errno
    return result


cdef struct Range:
    uint64_t start
    uint64_t end
    uint64_t *words


cdef class WriteFaults:
    """Writes to protected pages, which wait until their page is marked and let through.

    What a page is marked by and what it is protected by change together, under a lock: were a mark
    taken and its page protected between the marking and the letting through, the write would come
    after both and be seen by nobody.

    Args:
        fd: the userfaultfd, which stays the caller's.
        ranges: for each range of memory its address, its bytes, and the words of its bitmap.
        page: bytes of a page.
    """

    cdef pthread_mutex_t lock
    cdef Range *ranges
    cdef size_t count, page
    cdef int fd, is_serving, failed
    cdef list kept  # the words stay where they are

    def __cinit__(self, int fd, ranges, size_t page):
        cdef uint64_t[::1] words
        self.fd = fd
        self.page = page
        self.kept = []
        pthread_mutex_init(&self.lock, NULL)
        self.ranges = <Range *>malloc(max(len(ranges), 1) * sizeof(Range))
        if not self.ranges:
            raise MemoryError
        for address, length, bitmap in ranges:
            words = bitmap
            if length % page or <uint64_t>words.shape[0] * 64 < length // page or not length:
                raise ValueError(f"{words.shape[0]} words for {length} bytes")
            self.kept.append(words)
            self.ranges[self.count] = Range(address, address + length, &words[0])
            self.count += 1

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)
        free(self.ranges)

    @property
    def serving(self):
        """Whether `serve` has come so far that it needs no GIL: RAM may be protected now.

        Before that, a thread that writes to a protected page and holds the GIL would wait for ever.
        """
        return rm_atomic_get(&self.is_serving) != 0

    def serve(self, int wake):
        """Mark and let through, until ``wake`` becomes readable.

        Returns:
            0, or the negative errno that ended it. Then RAM is not protected any more: better an
            error of the next `take` than writers that hang, and maybe hold the GIL.
        """
        cdef int result
        cdef size_t i
        with nogil:
            rm_atomic_set(&self.is_serving)
            while True:
                result = rm_uffd_wait(self.fd, wake)
                if result <= 0:
                    break
                result = self.answer()
                if result < 0:
                    break
            if result < 0:
                pthread_mutex_lock(&self.lock)
                self.failed = result
                for i in range(self.count):
                    rm_uffd_unregister(
                        self.fd, self.ranges[i].start, self.ranges[i].end - self.ranges[i].start)
                pthread_mutex_unlock(&self.lock)
        return result

    cdef int answer(self) noexcept nogil:
        cdef uint64_t address = 0
        cdef size_t i, at
        cdef int result = 0
        pthread_mutex_lock(&self.lock)
        while result == 0:
            result = rm_uffd_next(self.fd, &address)
            if result < 0:
                break
            for i in range(self.count):
                if self.ranges[i].start <= address < self.ranges[i].end:
                    at = <size_t>(address - self.ranges[i].start) // self.page
                    rm_atomic_or(&self.ranges[i].words[at >> 6], (<uint64_t>1) << (at & 63))
                    result = rm_uffd_protect(
                        self.fd, self.ranges[i].start + at * self.page, self.page, 0)
                    break
        pthread_mutex_unlock(&self.lock)
        return 0 if result == -EAGAIN or result == -EINTR else result

    def take(self, size_t index, uint64_t[::1] into not None):
        """Move the marks of a range to ``into``, and protect the marked pages again.

        Returns:
            How many pages were marked, or a negative errno, that of `serve` too.
        """
        cdef Range *here
        cdef uint64_t pages, at = 0, stop, i, count = 0
        cdef int result = 0
        if index >= self.count:
            raise IndexError(f"range {index} of {self.count}")
        here = &self.ranges[index]
        pages = (here.end - here.start) // self.page
        if <uint64_t>into.shape[0] * 64 < pages:
            raise IndexError(f"{pages} pages into {into.shape[0]} words")
        with nogil:
            pthread_mutex_lock(&self.lock)
            result = self.failed
            while result == 0:
                at = rm_next_bit(here.words, at, pages, 0)
                if at >= pages:
                    break
                stop = rm_next_bit(here.words, at, pages, <uint64_t>0xffffffffffffffff)
                result = rm_uffd_protect(
                    self.fd, here.start + at * self.page, (stop - at) * self.page, 1)
                count += stop - at
                at = stop
            if result == 0:
                for i in range((pages + 63) // 64):
                    into[<Py_ssize_t>i] |= rm_atomic_take(&here.words[i])
            pthread_mutex_unlock(&self.lock)
        return result if result < 0 else count
