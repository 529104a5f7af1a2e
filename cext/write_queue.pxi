# SPDX-License-Identifier: Apache-2.0
# From guest pages to RDMA writes.

cdef struct Target:
    uint64_t local
    uint64_t remote
    uint64_t length
    uint32_t lkey
    uint32_t rkey


cdef class WriteQueue:
    """Merges guest pages into RDMA writes: the one queue behind the per-page and the bulk call.

    A page extends the pending run when it begins where the run ends, in the same block, and ends
    no later than the run's chunk; otherwise the run is written and the page begins a new one
    (docs/protocol.md, RAM phases).

    Args:
        work: the WorkQueue to post to.
        chunk_size: bytes of a chunk, counted from the block's first byte; a power of two.
        max_write: most bytes of one write made by save_runs().
        interrupted: called with a code other than DONE when posting has to wait and the wait is
            interrupted; it raises, or returns when the queue shall go on.
    """

    cdef WorkQueue work
    cdef object interrupted
    cdef Target *targets
    cdef int count
    cdef uint64_t chunk_size
    cdef uint64_t max_write
    cdef uint64_t pending_start
    cdef uint64_t pending_end
    cdef uint64_t pending_limit
    cdef int pending_block
    cdef unsigned long thread
    cdef public int64_t deadline_ns
    cdef readonly uint64_t writes
    cdef readonly uint64_t bytes
    cdef bint opened

    def __cinit__(self):
        self.targets = NULL
        self.pending_block = -1

    def __init__(self, WorkQueue work, *, uint64_t chunk_size, uint64_t max_write, interrupted):
        if chunk_size == 0 or chunk_size & (chunk_size - 1):
            raise ValueError("chunk_size must be a power of two")
        if not 0 < max_write <= 1 << 30:
            # One write of exactly 2 GiB was seen to report success and break a queue pair.
            raise ValueError("max_write must be 1 byte to 1 GiB")
        self.work = work
        self.chunk_size = chunk_size
        self.max_write = max_write
        self.interrupted = interrupted

    def __dealloc__(self):
        free(self.targets)

    def set_targets(self, targets) -> None:
        """Say where each block lies: a list of (local, lkey, remote, rkey, length), by index."""
        if self.targets != NULL:
            raise ValueError("the targets are known already")
        self.targets = <Target *> calloc(max(len(targets), 1), sizeof(Target))
        if self.targets == NULL:
            raise MemoryError()
        for i, (local, lkey, remote, rkey, length) in enumerate(targets):
            self.targets[i].local = local
            self.targets[i].lkey = lkey
            self.targets[i].remote = remote
            self.targets[i].rkey = rkey
            self.targets[i].length = length
        self.count = len(targets)

    def open(self) -> None:
        """Begin a phase: pages are taken until close(), from this thread."""
        if self.targets == NULL:
            raise ValueError("the destination's blocks are not known yet")
        if self.opened:
            raise ValueError("the phase before this one has not ended")
        self.thread = PyThread_get_thread_ident()
        self.opened = True

    def close(self) -> None:
        """End a phase. The pending run must have been flushed."""
        if self.pending_block >= 0:
            raise ValueError("a run is still pending")
        self.opened = False

    @property
    def is_open(self) -> bool:
        return self.opened

    @property
    def pending_bytes(self) -> int:
        """Bytes of the run that is not written yet."""
        return self.pending_end - self.pending_start if self.pending_block >= 0 else 0

    cdef int require(self, int block, uint64_t offset, uint64_t size) except -1:
        if not self.opened:
            raise ValueError("a page outside before_iterate and after_iterate")
        if self.thread != PyThread_get_thread_ident():
            raise ValueError("a page from another thread than the one that began the phase")
        if not 0 <= block < self.count:
            raise ValueError(f"there is no block {block}")
        if (size == 0 or offset > self.targets[block].length
                or size > self.targets[block].length - offset):
            raise ValueError(f"{size} bytes at {offset} are not within block {block} of "
                             f"{self.targets[block].length} bytes")
        return 0

    cdef int write(self, int block, uint64_t start, uint64_t length) noexcept nogil:
        """Post one write; anything but DONE means that nothing was posted."""
        cdef Target *target = &self.targets[block]
        cdef ibv_sge sge
        cdef int result
        sge.addr = target.local + start
        sge.length = <uint32_t> length
        sge.lkey = target.lkey
        while True:
            if self.work.has_failed:
                return _FAILED
            if self.work.writes_outstanding >= self.work.write_limit:
                result = self.work.wait_nogil(_WAIT_ROOM, self.deadline_ns)
                if result != _DONE:
                    return result
            result = self.work.post(KIND_WRITE, &sge, 1, IBV_WR_RDMA_WRITE,
                                    target.remote + start, target.rkey)
            if result == 0:
                break
            if result != ENOMEM or self.work.writes_outstanding == 0:
                self.work.note_failure(-result, KIND_WRITE, 0)
                return _FAILED
            # The device's queue is shorter than it said: take what fits as the limit.
            self.work.write_limit = self.work.writes_outstanding
        self.work.writes_outstanding += 1
        self.writes += 1
        self.bytes += length
        return _DONE

    cdef int flush_nogil(self) noexcept nogil:
        cdef int result
        if self.pending_block < 0:
            return _DONE
        result = self.write(self.pending_block, self.pending_start,
                            self.pending_end - self.pending_start)
        if result == _DONE:
            self.pending_block = -1
        return result

    cdef int append(self, int block, uint64_t offset, uint64_t size) noexcept nogil:
        """Take one page, all or nothing: after anything but DONE call again with the same."""
        cdef int result
        if (block == self.pending_block and offset == self.pending_end
                and offset + size <= self.pending_limit):
            self.pending_end = offset + size
            return _DONE
        result = self.flush_nogil()
        if result != _DONE:
            return result
        self.pending_block = block
        self.pending_start = offset
        self.pending_end = offset + size
        self.pending_limit = (offset // self.chunk_size + 1) * self.chunk_size
        return _DONE

    def save_page(self, int block, uint64_t offset, uint64_t size) -> None:
        """Take one page of a block: offset and size in bytes."""
        self.require(block, offset, size)
        cdef int result = self.append(block, offset, size)
        while result != _DONE:
            self.resume(result)
            result = self.append(block, offset, size)

    def save_runs(self, int block, const uint64_t[:, ::1] runs) -> int:
        """Write many runs, rows of (offset, length) in bytes; return the bytes taken."""
        cdef Py_ssize_t i = 0
        cdef uint64_t done = 0, total = 0
        cdef int result
        if runs.shape[1] != 2:
            raise ValueError("runs must be rows of (offset, length)")
        for i in range(runs.shape[0]):
            self.require(block, runs[i, 0], runs[i, 1])
            total += runs[i, 1]
        self.flush()
        i = 0
        while True:
            with nogil:
                result = self.advance(block, runs, &i, &done)
            if result == _DONE:
                return total
            self.resume(result)

    cdef int advance(self, int block, const uint64_t[:, ::1] runs, Py_ssize_t *i,
                     uint64_t *done) noexcept nogil:
        cdef uint64_t length
        cdef int result
        while i[0] < runs.shape[0]:
            while done[0] < runs[i[0], 1]:
                length = min(runs[i[0], 1] - done[0], self.max_write)
                result = self.write(block, runs[i[0], 0] + done[0], length)
                if result != _DONE:
                    return result
                done[0] += length
            i[0] += 1
            done[0] = 0
        return _DONE

    def flush(self) -> None:
        """Write the pending run, if there is one. Does not wait for its completion."""
        cdef int result = self.flush_nogil()
        while result != _DONE:
            self.resume(result)
            result = self.flush_nogil()

    cdef int resume(self, int result) except -1:
        if result == _INTERRUPTED:
            PyErr_CheckSignals()
        else:
            self.interrupted(result)
        return 0
