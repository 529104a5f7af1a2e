# SPDX-License-Identifier: Apache-2.0
"""The RDMA layer under rdma_mig.verbs: what pyverbs cannot do, and what Python is too slow for.

pyverbs owns the context, protection domain, completion queue, queue pair, connection identifier
and events. Here are registration, posting, polling and waiting, all without the GIL, and the
calls of librdmacm that pyverbs lacks.
"""

from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from libc.errno cimport EBADF, EINTR, EIO, ENODEV, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strerror
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close, read, write

from pages cimport rm_is_zero
from rdma_mig._hooks cimport PageTaker
from verbs cimport *


cdef extern from "<fcntl.h>" nogil:
    enum: O_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int pipe2(int *ends, int flags)

cdef extern from "<sys/socket.h>" nogil:
    enum: AF_INET
    enum: AF_INET6

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum: POLLIN
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, const void *sigmask)

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil

QPS_INIT = IBV_QPS_INIT
QPS_RTR = IBV_QPS_RTR
QPS_RTS = IBV_QPS_RTS

include "handles.pxi"
include "connection_manager.pxi"
include "memory_region.pxi"
include "work_queue.pxi"
include "write_queue.pxi"
