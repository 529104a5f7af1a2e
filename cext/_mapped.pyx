# SPDX-License-Identifier: Apache-2.0
"""A file that is written by stores into its mapping: no system call for what is appended.

What was stored is the kernel's, and stays in the file whatever becomes of the process. The file is
longer than its content until it is closed: zeros follow. A piece shows up whole: its first byte,
which is not zero, is stored last.

Where the file loses its pages under the mapping (somebody shortens it, or its disk is full after
all), a store raises SIGBUS. The handler here puts memory in the place of the mapping, and the next
append() fails; a SIGBUS of anything else goes to whoever handled it before.
"""

from libc.errno cimport EBADF, EIO, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t

import os

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <signal.h>
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/types.h>
    #include <unistd.h>

    #define RM_WINDOWS 16

    static struct rm_window {
        char *volatile start;
        volatile size_t length;
        volatile sig_atomic_t used, lost;
    } rm_windows[RM_WINDOWS];
    static struct sigaction rm_before;
    static int rm_handling;

    static void rm_on_bus(int number, siginfo_t *info, void *context)
    {
        int saved = errno;
        for (int i = 0; i < RM_WINDOWS; i++) {
            struct rm_window *window = &rm_windows[i];
            char *start = window->start;
            if (!start || (char *) info->si_addr < start
                || (char *) info->si_addr >= start + window->length)
                continue;
            window->lost = 1;
            if (mmap(start, window->length, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
                errno = saved;
                return;
            }
        }
        /* None of ours: the access is tried again, and meets the handler of before. */
        sigaction(SIGBUS, &rm_before, NULL);
        errno = saved;
    }

    static int rm_take_window(void)
    {
        for (int i = 0; i < RM_WINDOWS; i++)
            if (!rm_windows[i].used) {
                if (rm_handling == 0) {
                    struct sigaction ours = {.sa_sigaction = rm_on_bus,
                                             .sa_flags = SA_SIGINFO | SA_ONSTACK};
                    sigemptyset(&ours.sa_mask);
                    if (sigaction(SIGBUS, &ours, &rm_before) != 0)
                        return -1;
                }
                rm_handling++;
                rm_windows[i].used = 1;
                return i;
            }
        errno = EMFILE;
        return -1;
    }

    static void rm_unmap(int index)
    {
        struct rm_window *window = &rm_windows[index];
        char *start = window->start;
        if (start) {
            munmap(start, window->length);
            window->start = NULL;
        }
    }

    static void rm_release_window(int index)
    {
        struct sigaction now;
        rm_unmap(index);
        rm_windows[index].used = 0;
        rm_windows[index].lost = 0;
        if (--rm_handling == 0 && sigaction(SIGBUS, NULL, &now) == 0
            && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == rm_on_bus)
            sigaction(SIGBUS, &rm_before, NULL);
    }

    static int rm_map(int index, int fd, int64_t offset, size_t length)
    {
        /* Space on disk first, where that can be had; elsewhere the file is made longer only. */
        if (fallocate(fd, 0, offset, length) != 0
            && (errno != EOPNOTSUPP || ftruncate(fd, offset + length) != 0))
            return -1;
        char *start = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                           offset);
        if (start == MAP_FAILED)
            return -1;
        rm_windows[index].length = length;
        rm_windows[index].start = start;
        return 0;
    }

    /* Returns whether the file still had its pages. */
    static int rm_store(int index, size_t at, const char *data, size_t length)
    {
        char *target = rm_windows[index].start + at;
        memcpy(target + 1, data + 1, length - 1);
        __atomic_store_n(target, data[0], __ATOMIC_RELEASE);
        return !rm_windows[index].lost;
    }
    """
    int rm_take_window() nogil
    void rm_release_window(int index) nogil
    void rm_unmap(int index) nogil
    int rm_map(int index, int fd, int64_t offset, size_t length) nogil
    int rm_store(int index, size_t at, const char *data, size_t length) nogil

# Bytes of a step by which the file grows; a piece fits into one wherever in a page it begins.
cdef enum:
    _PAGE = 4096
    _STEP = 65536
    _LONGEST = _STEP - _PAGE

LONGEST = _LONGEST


cdef class MappedFile:
    """Appends to a regular file, from one thread at a time.

    Args:
        fd: of an empty regular file, open to be read and written. It is the caller's to close,
            after this.

    Raises:
        OSError: the file cannot be mapped, or there is no room for it.
    """

    cdef int fd
    cdef int window
    cdef int64_t begin  # of the window in the file
    cdef int64_t used  # bytes of content
    cdef object owner  # the process that made it

    def __cinit__(self, int fd) -> None:
        self.window = -1
        self.fd = fd
        self.owner = os.getpid()

    def __init__(self, int fd) -> None:
        self.window = rm_take_window()
        if self.window < 0:
            raise OSError(errno, os.strerror(errno))
        self.map(0)

    cdef int map(self, int64_t begin) except -1:
        rm_unmap(self.window)
        if rm_map(self.window, self.fd, begin, _STEP) != 0:
            # Without a window nothing more is appended.
            why = errno
            self.give_back()
            raise OSError(why, os.strerror(why))
        self.begin = begin
        return 0

    cdef void give_back(self) noexcept:
        if self.window >= 0:
            rm_release_window(self.window)
            self.window = -1

    def append(self, bytes data) -> None:
        """Put these bytes behind the others.

        Args:
            data: up to ``LONGEST`` bytes, the first of which is not zero.

        Raises:
            OSError: the file has no room for them, was closed, or has lost its pages.
        """
        cdef size_t length = len(data)
        if self.window < 0:
            raise OSError(EBADF, os.strerror(EBADF))
        if length == 0 or length > _LONGEST or data[0] == 0:
            raise ValueError(f"a piece of {length} bytes, or with a zero first")
        if self.used + <int64_t> length > self.begin + _STEP:
            self.map(self.used // _PAGE * _PAGE)
        if not rm_store(self.window, <size_t> (self.used - self.begin), data, length):
            raise OSError(EIO, "somebody else shortened the file, or there is no room for it")
        self.used += length

    def close(self) -> None:
        """Let the file end with its content. Idempotent."""
        fd, self.fd = self.fd, -1
        self.give_back()
        # A child that was forked has the mapping too, and its parent still writes.
        if fd >= 0 and os.getpid() == self.owner and os.fstat(fd).st_size > self.used:
            os.ftruncate(fd, self.used)

    def __dealloc__(self) -> None:
        self.give_back()
