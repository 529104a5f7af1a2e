# SPDX-License-Identifier: Apache-2.0
# From a pyverbs object to the C handle in it.
#
# pyverbs ships no declarations that another extension could cimport, and its own need a private
# header. Its objects have kept one layout since rdma-core 31: the raw pointer is the first field
# after the fields of the base class. That is relied on here, and checked: the size of the base
# classes at import, and each handle before its first use, by reading what it points at without
# dereferencing it (a wrong layout gives an exception, not a crash) and comparing with what pyverbs
# itself says of the object.

import pyverbs.base as _base
import pyverbs.cmid as _cmid
import pyverbs.cq as _cq
import pyverbs.device as _device
import pyverbs.pd as _pd
import pyverbs.qp as _qp

cdef extern from *:
    """
    typedef struct {
        PyObject_HEAD
        void *weakrefs, *logger, *vtable, *raw;
    } rdma_mig_handle;
    """
    ctypedef struct rdma_mig_handle:
        void *raw

if _base.PyverbsObject.__basicsize__ != 32 or _base.PyverbsCM.__basicsize__ != 40:
    raise ImportError(
        "this pyverbs lays its objects out in another way than rdma-mig knows "
        f"(base sizes {_base.PyverbsObject.__basicsize__} and {_base.PyverbsCM.__basicsize__}, "
        "known are 32 and 40)")


cdef void *raw_handle(object wrapper, object expected_type) except NULL:
    if not isinstance(wrapper, expected_type):
        raise TypeError(f"expected {expected_type.__name__}, not {type(wrapper).__name__}")
    cdef void *raw = (<rdma_mig_handle *> <PyObject *> wrapper).raw
    if raw == NULL:
        raise ValueError(f"this {expected_type.__name__} is closed")
    return raw


cdef int peek(const void *address, void *into, size_t length) except -1:
    """Read our own memory without trusting the address: an exception instead of a fault.

    Through a pipe, since the kernel answers EFAULT to a write() from an address that is none.
    process_vm_readv() does the same in one call, but some container engines forbid it.
    ``length`` is that of a small structure, which a pipe always has room for.
    """
    cdef int[2] ends
    if pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0:
        raise OSError(errno, f"pipe: {strerror(errno).decode()}")
    cdef ssize_t count = write(ends[1], address, length)
    if count == <ssize_t> length:
        count = read(ends[0], into, length)
    close(ends[0])
    close(ends[1])
    if count != <ssize_t> length:
        raise layout_error("an address that cannot be read")
    return 0


def layout_error(what):
    return RuntimeError(f"pyverbs objects are not laid out as rdma-mig expects: {what}; "
                        "please report the version of pyverbs")


cdef int agree(object ours, object theirs, str what) except -1:
    if ours != theirs:
        raise layout_error(f"{what} is {ours} in the handle and {theirs} in pyverbs")
    return 0


cdef ibv_pd *pd_handle(object pd) except NULL:
    cdef ibv_pd *raw = <ibv_pd *> raw_handle(pd, _pd.PD)
    cdef ibv_pd seen
    peek(raw, &seen, sizeof(seen))
    agree(seen.handle, pd.handle, "the protection domain's handle")
    return raw


cdef ibv_cq *cq_handle(object cq) except NULL:
    cdef ibv_cq *raw = <ibv_cq *> raw_handle(cq, _cq.CQ)
    cdef ibv_cq seen
    peek(raw, &seen, sizeof(seen))
    agree(seen.cqe, cq.cqe, "the completion queue's size")
    return raw


cdef ibv_qp *qp_handle(object qp) except NULL:
    cdef ibv_qp *raw = <ibv_qp *> raw_handle(qp, _qp.QP)
    cdef ibv_qp seen
    peek(raw, &seen, sizeof(seen))
    agree(seen.qp_num, qp.qp_num, "the queue pair's number")
    return raw


cdef ibv_context *context_handle(object context) except NULL:
    cdef ibv_context *raw = <ibv_context *> raw_handle(context, _device.Context)
    cdef ibv_context seen
    peek(raw, &seen, sizeof(seen))
    agree(seen.cmd_fd, context.cmd_fd, "the device's file descriptor")
    return raw


cdef rdma_event_channel *channel_handle(object channel) except NULL:
    cdef rdma_event_channel *raw = <rdma_event_channel *> raw_handle(
        channel, _cmid.CMEventChannel)
    cdef rdma_event_channel seen
    peek(raw, &seen, sizeof(seen))
    if seen.fd < 0 or fcntl(seen.fd, F_GETFL) < 0:
        raise layout_error("the event channel's file descriptor is not open")
    return raw


cdef rdma_cm_id *id_handle(object cmid) except NULL:
    cdef rdma_cm_id *raw = <rdma_cm_id *> raw_handle(cmid, _cmid.CMID)
    cdef rdma_cm_id seen
    peek(raw, &seen, sizeof(seen))
    agree(seen.ps, RDMA_PS_TCP, "the port space")
    if seen.channel != channel_handle(cmid.event_channel):
        raise layout_error("a connection identifier that names another event channel")
    return raw


cdef rdma_cm_event *event_handle(object event) except NULL:
    cdef rdma_cm_event *raw = <rdma_cm_event *> raw_handle(event, _cmid.CMEvent)
    cdef rdma_cm_event seen
    peek(raw, &seen, sizeof(seen))
    agree(seen.event, event.event_type, "the event's type")
    return raw
