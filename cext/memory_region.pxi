# SPDX-License-Identifier: Apache-2.0
# Registration without the GIL: pinning a large guest takes seconds.

import warnings


cdef class MemoryRegion:
    """A registered range of memory (ibv_mr).

    Args:
        pd: the pyverbs PD it belongs to; close the region before the PD.
        address: first byte, a host virtual address.
        length: bytes.
        remote_write: whether the peer may write it. The least access is given: without it the
            region is only read by this host.
        local_write: whether this host's receives may land in it.
        holder: an object with ``release()``, called when the region is gone; it keeps the memory.

    Raises:
        OSError: the errno of ibv_reg_mr().
    """

    cdef ibv_mr *mr
    cdef readonly uint64_t address
    cdef readonly uint64_t length
    cdef object pd
    cdef object holder

    def __init__(self, pd, uint64_t address, uint64_t length, *, bint remote_write=False,
                 bint local_write=False, holder=None):
        if self.mr != NULL:
            raise ValueError("already registered")
        cdef ibv_pd *raw = pd_handle(pd)
        cdef int access = 0
        # A region that the peer may write must be writable by this host (ibv_reg_mr(3)).
        if remote_write or local_write:
            access |= IBV_ACCESS_LOCAL_WRITE
        if remote_write:
            access |= IBV_ACCESS_REMOTE_WRITE
        cdef int error = 0
        with nogil:
            self.mr = ibv_reg_mr(raw, <void *> address, length, access)
            if self.mr == NULL:
                error = errno
        if self.mr == NULL:
            raise OSError(error, f"ibv_reg_mr of {length} bytes: {strerror(error).decode()}")
        self.pd = pd
        self.address = address
        self.length = length
        self.holder = holder

    @property
    def lkey(self) -> int:
        self.require_open()
        return self.mr.lkey

    @property
    def rkey(self) -> int:
        self.require_open()
        return self.mr.rkey

    @property
    def closed(self) -> bool:
        return self.mr == NULL

    cdef int require_open(self) except -1:
        if self.mr == NULL:
            raise ValueError("the memory region is closed")
        return 0

    def close(self) -> None:
        """Deregister: from its return on nobody else can change the memory. Idempotent."""
        cdef int error
        if self.mr == NULL:
            return
        with nogil:
            error = ibv_dereg_mr(self.mr)
        # EIO, ENODEV: the device has been removed, and the kernel has let go of the memory.
        if error != 0 and error != EIO and error != ENODEV:
            raise OSError(error, f"ibv_dereg_mr: {strerror(error).decode()}")
        self.mr = NULL
        self.pd = None
        if self.holder is not None:
            self.holder.release()
            self.holder = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __dealloc__(self):
        if self.mr != NULL:
            warnings.warn("unclosed MemoryRegion", ResourceWarning, stacklevel=1)
            ibv_dereg_mr(self.mr)
            self.mr = NULL
