# SPDX-License-Identifier: Apache-2.0
# From guest pages to RDMA writes.

cdef struct Keys:
    uint32_t lkey
    uint32_t rkey

cdef struct Target:
    uint64_t local
    uint64_t remote
    uint64_t length
    # Where it begins in the RAM address space.
    uint64_t offset
    # One pair for the whole block, or one a chunk; an rkey of 0 is not known yet.
    Keys *keys
    uint64_t chunks
    # Where the destination's memory was zero from the start: for each chunk, whether nothing was
    # written to it yet. NULL elsewhere.
    uint8_t *untouched

# How far ahead a run is looked at for chunks that have no keys yet.
cdef enum:
    WANTED_CHUNKS = 256


# Queue pairs that share the writes, and the stretch of a block that belongs to one of them: the
# next stretch is the next one's. What is written twice goes the same way twice, in order.
cdef enum:
    MAX_QUEUES = 16
    STRIPE = 16 << 20

# Spans that are kept between two calls of take_spans().
DEF _SPANS = 256

cdef struct Span:
    int block
    uint64_t first
    uint64_t last
    uint64_t writes
    uint64_t bytes
    bint whole


cdef class WriteQueue(PageTaker):
    """Merges guest pages into RDMA writes: the one queue behind the per-page and the bulk call.

    A page extends the pending run when it begins where the run ends, in the same block, and ends
    no later than the run's chunk; otherwise the run is written and the page begins a new one
    (docs/protocol.md, RAM phases).

    Args:
        work: the WorkQueue to post to.
        beside: further ones, of queue pairs in the same protection domain, that share the writes.
            16 MiB of a block in a row are one's, for the whole migration: writes over different
            queue pairs have no order.
        chunk_size: bytes of a chunk, counted from the block's first byte; a power of two.
        max_write: most bytes of one write made by save_runs().
        interrupted: called with a code other than DONE when posting has to wait and the wait is
            interrupted; it raises, or returns when the queue shall go on. With NEED_KEY the run
            in ``wanted`` lies in chunks without keys: it calls set_chunk_keys() for the first of
            them, and for more, or skip().
        issued: called with the bytes of the writes posted since it was called last, and the bytes
            that were zero and needed none, before the call that took them returns: once a call,
            not once a page. None to leave it.
    """

    cdef WorkQueue work
    cdef tuple all_work
    cdef void *works[MAX_QUEUES]
    cdef int queues
    cdef readonly int blocked  # index of the queue that a write waited for last: 0 is `work`
    cdef object interrupted
    cdef object issued
    cdef uint64_t accounted
    cdef uint64_t zeros_accounted
    cdef Target *targets
    cdef int count
    cdef uint64_t chunk_size
    cdef uint64_t max_write
    cdef uint64_t pending_start
    cdef uint64_t pending_end
    cdef uint64_t pending_limit
    cdef int pending_block
    cdef int wanted_block
    cdef uint64_t wanted_start
    cdef uint64_t wanted_length
    cdef uint64_t skipping
    cdef bint dynamic
    cdef unsigned long thread
    cdef public int64_t deadline_ns
    cdef readonly uint64_t writes
    cdef readonly uint64_t bytes
    cdef readonly uint64_t zero_bytes
    cdef bint opened
    cdef bint noting
    cdef int spans_used
    cdef Span spans[_SPANS]

    def __cinit__(self):
        self.targets = NULL
        self.pending_block = -1

    def __init__(self, WorkQueue work not None, *, uint64_t chunk_size, uint64_t max_write,
                 interrupted, issued=None, beside=()):
        if chunk_size == 0 or chunk_size & (chunk_size - 1):
            raise ValueError("chunk_size must be a power of two")
        if not 0 < max_write <= 1 << 30:
            # One write of exactly 2 GiB was seen to report success and break a queue pair.
            raise ValueError("max_write must be 1 byte to 1 GiB")
        if len(beside) >= MAX_QUEUES:
            raise ValueError(f"{len(beside)} queues beside the first, at most {MAX_QUEUES - 1}")
        if beside and STRIPE % chunk_size:
            raise ValueError("a chunk must not belong to two queues")
        cdef WorkQueue each
        self.queues = 0
        self.all_work = (work, *beside)
        for each in self.all_work:
            self.works[self.queues] = <void *> each
            self.queues += 1
        self.work = work
        self.chunk_size = chunk_size
        self.max_write = max_write
        self.interrupted = interrupted
        self.issued = issued

    def __dealloc__(self):
        cdef int i
        for i in range(self.count):
            free(self.targets[i].keys)
            free(self.targets[i].untouched)
        free(self.targets)

    def set_targets(self, targets, *, offsets=None, bint dynamic=False, fresh=()) -> None:
        """Say where each block lies: a list of (local, lkey, remote, rkey, length), by index.

        ``offsets`` are those of the blocks in the RAM address space, for take(); without them one
        block begins there where the one before ends. With ``dynamic`` the keys given are not used:
        each chunk gets its own, when it is first written. ``fresh`` are the indexes of blocks that
        are all zero at the destination: zeros need not be written to a chunk of theirs, as long as
        nothing else was.
        """
        cdef Target *target
        cdef uint64_t chunks, offset = 0
        if self.targets != NULL:
            raise ValueError("the targets are known already")
        self.targets = <Target *> calloc(max(len(targets), 1), sizeof(Target))
        if self.targets == NULL:
            raise MemoryError()
        self.dynamic = dynamic
        for local, lkey, remote, rkey, length in targets:
            target = &self.targets[self.count]
            target.local = local
            target.offset = offset if offsets is None else offsets[self.count]
            offset += length
            target.remote = remote
            target.length = length
            chunks = (target.length + self.chunk_size - 1) // self.chunk_size
            target.chunks = chunks if dynamic else 1
            if self.count in fresh:
                target.untouched = <uint8_t *> malloc(max(chunks, 1))
                if target.untouched == NULL:
                    raise MemoryError()
                memset(target.untouched, 1, max(chunks, 1))
            target.keys = <Keys *> calloc(max(target.chunks, 1), sizeof(Keys))
            if target.keys == NULL:
                raise MemoryError()
            self.count += 1
            if not dynamic:
                target.keys[0].lkey = lkey
                target.keys[0].rkey = rkey

    def set_chunk_keys(self, int block, uint64_t chunk, uint32_t lkey, uint32_t rkey) -> None:
        """Give a chunk its keys, in answer to NEED_KEY."""
        if not 0 <= block < self.count or chunk >= self.targets[block].chunks or rkey == 0:
            raise ValueError(f"no keys for chunk {chunk} of block {block}")
        self.targets[block].keys[chunk].lkey = lkey
        self.targets[block].keys[chunk].rkey = rkey

    @property
    def wanted(self):
        """(block, offset, length) of the run that NEED_KEY is about; no chunk of it has keys."""
        return self.wanted_block, self.wanted_start, self.wanted_length

    def skip(self, uint64_t length) -> None:
        """Take the first ``length`` bytes of the wanted run as done: they went in another way."""
        if not 0 < length <= self.wanted_length:
            raise ValueError(f"{length} of {self.wanted_length} bytes cannot be skipped")
        self.skipping = length

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

    cdef int require_phase(self) except -1:
        if not self.opened:
            raise ValueError("a page outside before_iterate and after_iterate")
        if self.thread != PyThread_get_thread_ident():
            raise ValueError("a page from another thread than the one that began the phase")
        return 0

    cdef int require(self, int block, uint64_t offset, uint64_t size) except -1:
        self.require_phase()
        if not 0 <= block < self.count:
            raise ValueError(f"there is no block {block}")
        if (size == 0 or offset > self.targets[block].length
                or size > self.targets[block].length - offset):
            raise ValueError(f"{size} bytes at {offset} are not within block {block} of "
                             f"{self.targets[block].length} bytes")
        return 0

    def note_spans(self) -> None:
        """Keep from now on which chunks are written, for take_spans()."""
        self.noting = True

    def take_spans(self) -> list[tuple[int, int, int, int, int, bool]]:
        """What was written since the last call: (block, first chunk, last, writes, bytes, whole).

        A span is of writes in a row, in one block, each in the chunk of the one before or in the
        next. Where there are more than can be kept, the last one reaches over gaps: not ``whole``.
        """
        cdef int i
        found = []
        for i in range(self.spans_used):
            found.append((self.spans[i].block, self.spans[i].first, self.spans[i].last,
                          self.spans[i].writes, self.spans[i].bytes, bool(self.spans[i].whole)))
        self.spans_used = 0
        return found

    cdef void note(self, int block, uint64_t start, uint64_t length) noexcept nogil:
        cdef uint64_t first = start // self.chunk_size
        cdef uint64_t last = (start + length - 1) // self.chunk_size
        cdef Span *span
        if self.spans_used > 0:
            span = &self.spans[self.spans_used - 1]
            if (span.block == block
                    and ((span.last <= first <= span.last + 1) or self.spans_used == _SPANS)):
                if not span.last <= first <= span.last + 1:
                    span.whole = False
                span.first = min(span.first, first)
                span.last = max(span.last, last)
                span.writes += 1
                span.bytes += length
                return
            if self.spans_used == _SPANS:
                # Of another block: only calls with one block each come between two take_spans().
                return
        span = &self.spans[self.spans_used]
        self.spans_used += 1
        span.block = block
        span.first = first
        span.last = last
        span.writes = 1
        span.bytes = length
        span.whole = True

    cdef bint needless(self, Target *target, uint64_t start, uint64_t end) noexcept nogil:
        """Whether a run within one chunk is zero, and zero at the destination from the start."""
        return (target.untouched != NULL and target.untouched[start // self.chunk_size]
                and rm_is_zero(<const uint8_t *> target.local + start, end - start))

    cdef uint64_t extent(self, Target *target, uint64_t start, uint64_t end) noexcept nogil:
        """Where a write from ``start`` has to end: at other keys, or at zeros that need none."""
        cdef uint64_t chunk = start // self.chunk_size
        cdef uint64_t border = (chunk + 1) * self.chunk_size
        cdef Keys *keys = &target.keys[chunk] if self.dynamic else target.keys
        while border < end:
            chunk += 1
            if self.dynamic and (target.keys[chunk].rkey != keys.rkey
                                 or target.keys[chunk].lkey != keys.lkey):
                return border
            if self.needless(target, border, min(border + self.chunk_size, end)):
                return border
            border += self.chunk_size
        return end

    cdef int want(self, int block, uint64_t start, uint64_t end) noexcept nogil:
        """Ask for keys; the run goes up to the first chunk that has some."""
        cdef Target *target = &self.targets[block]
        cdef uint64_t chunk = start // self.chunk_size
        cdef uint64_t last = min(chunk + WANTED_CHUNKS, target.chunks)
        while chunk < last and target.keys[chunk].rkey == 0:
            chunk += 1
        self.wanted_block = block
        self.wanted_start = start
        self.wanted_length = min(end, chunk * self.chunk_size) - start
        return _NEED_KEY

    cdef int write(self, int block, uint64_t start, uint64_t *length) noexcept nogil:
        """Post one write of what it can of a run, and say in length how much that was.

        Anything but DONE means that nothing was posted.
        """
        cdef Target *target = &self.targets[block]
        cdef Keys *keys = target.keys
        cdef uint64_t chunk = start // self.chunk_size
        cdef uint64_t end = min(start + length[0], (chunk + 1) * self.chunk_size)
        cdef uint64_t stripe = start // STRIPE
        cdef ibv_sge sge
        cdef int queue = 0
        if self.skipping:
            length[0] = min(length[0], self.skipping)
            self.skipping = 0
            return _DONE
        if self.needless(target, start, end):
            self.zero_bytes += end - start
            length[0] = end - start
            return _DONE
        if self.dynamic:
            keys += chunk
            if keys.rkey == 0:
                return self.want(block, start, start + length[0])
        length[0] = min(length[0], self.max_write)
        if self.queues > 1:
            queue = <int> ((<uint64_t> block + stripe) % <uint64_t> self.queues)
            length[0] = min(length[0], (stripe + 1) * STRIPE - start)
        length[0] = self.extent(target, start, start + length[0]) - start
        sge.addr = target.local + start
        sge.length = <uint32_t> length[0]
        sge.lkey = keys.lkey
        self.blocked = queue
        cdef int result = self.post(<WorkQueue> self.works[queue], &sge, target.remote + start,
                                    keys.rkey)
        if result != _DONE:
            return result
        self.writes += 1
        self.bytes += length[0]
        if self.noting:
            self.note(block, start, length[0])
        if target.untouched != NULL:
            memset(&target.untouched[chunk], 0,
                   (start + length[0] - 1) // self.chunk_size - chunk + 1)
        return _DONE

    cdef int post(self, WorkQueue work, ibv_sge *sge, uint64_t remote,
                  uint32_t rkey) noexcept nogil:
        """Post one write to a queue, which is waited for when it is full."""
        cdef int result
        if work.has_failed:
            return _FAILED
        if not work.satisfied(_WAIT_ROOM):
            result = work.wait_nogil(_WAIT_ROOM, self.deadline_ns)
            if result != _DONE:
                return result
        work.write(sge, remote, rkey)
        return _DONE  # it is listed: a failure to post the list shows in post_lists()

    cdef int flush_nogil(self) noexcept nogil:
        cdef int result
        cdef uint64_t length
        if self.pending_block < 0:
            return _DONE
        # It lies within one chunk, so that it goes as a whole or not at all.
        length = self.pending_end - self.pending_start
        result = self.write(self.pending_block, self.pending_start, &length)
        if result == _DONE:
            self.pending_start += length
            if self.pending_start < self.pending_end:
                return self.flush_nogil()
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
        self.pending_limit = min((offset // self.chunk_size + 1) * self.chunk_size,
                                 self.targets[block].length)
        return _DONE

    cdef int take(self, uint64_t block_offset, uint64_t offset, uint64_t size) except -1:
        """Take one page of the block at an offset of the RAM address space."""
        cdef int block = self.pending_block
        # Most pages extend the run: that they are within the block follows from its limit.
        if (block >= 0 and self.targets[block].offset == block_offset
                and offset == self.pending_end and 0 < size <= self.pending_limit - offset
                and self.opened and self.thread == PyThread_get_thread_ident()):
            self.pending_end = offset + size
            return 0
        self.require_phase()
        for block in range(self.count):
            if self.targets[block].offset == block_offset:
                self.save_page(block, offset, size)
                return 0
        raise ValueError(f"no RAM block begins at {block_offset:#x}")

    cpdef int save_page(self, int block, uint64_t offset, uint64_t size) except -1:
        """Take one page of a block: offset and size in bytes."""
        self.require(block, offset, size)
        if offset % self.chunk_size + size > self.chunk_size:
            raise ValueError(f"the page at {offset} crosses a border between chunks")
        cdef int result = self.append(block, offset, size)
        while result != _DONE:
            self.resume(result)
            result = self.append(block, offset, size)
        # Page by page, nobody knows how soon the next run ends: this one is not kept waiting.
        result = self.post_lists()
        if result != _DONE:
            self.resume(result)
        self.account()
        return 0

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
                self.account()
                return total
            self.resume(result)

    cdef int advance(self, int block, const uint64_t[:, ::1] runs, Py_ssize_t *i,
                     uint64_t *done) noexcept nogil:
        cdef uint64_t start, length
        cdef int result
        while i[0] < runs.shape[0]:
            while done[0] < runs[i[0], 1]:
                start = runs[i[0], 0] + done[0]
                length = runs[i[0], 1] - done[0]
                result = self.write(block, start, &length)
                if result != _DONE:
                    return result
                done[0] += length
            i[0] += 1
            done[0] = 0
        return self.post_lists()

    def flush(self) -> None:
        """Write the pending run, if there is one. Does not wait for its completion."""
        cdef int result = self.finish_run()
        while result != _DONE:
            self.resume(result)
            result = self.finish_run()
        self.account()

    cdef int finish_run(self) noexcept nogil:
        cdef int result = self.flush_nogil()
        return self.post_lists() if result == _DONE else result

    cdef int post_lists(self) noexcept nogil:
        """Post what is listed; what finds no room is posted when that is waited for."""
        cdef int i
        for i in range(self.queues):
            (<WorkQueue> self.works[i]).post_writes()
            if (<WorkQueue> self.works[i]).has_failed:
                self.blocked = i
                return _FAILED
        return _DONE

    cdef int account(self) except -1:
        cdef uint64_t size = self.bytes - self.accounted
        cdef uint64_t zeros = self.zero_bytes - self.zeros_accounted
        self.accounted = self.bytes
        self.zeros_accounted = self.zero_bytes
        if (size or zeros) and self.issued is not None:
            self.issued(size, zeros)
        return 0

    cdef int resume(self, int result) except -1:
        # What follows may raise: what was posted is counted all the same.
        self.account()
        if result == _INTERRUPTED:
            PyErr_CheckSignals()
        else:
            self.interrupted(result)
        return 0
