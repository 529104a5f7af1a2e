# SPDX-License-Identifier: Apache-2.0
# One queue pair's posting, polling and waiting.

# What a work request was, in the top byte of its id.
cdef enum:
    KIND_SHIFT = 56
    KIND_WRITE = 1
    KIND_SEND = 2
    KIND_RECEIVE = 3
    KIND_PROBE = 4

# Receive completions that were not asked for yet. A peer that keeps to the protocol has one or two
# messages under way; the queue is as long as there are slots, so that it cannot overflow.
cdef enum:
    MAX_SLOTS = 16
    POLL_BATCH = 32
    # Send queue entries that writes leave free for control messages and probes.
    CONTROL_RESERVE = 16
    # Writes are posted as a list: one call of the driver, and one completion, for so many, or for
    # so many bytes. No send queue is shorter than a list: a full one has a write that completes.
    LIST_WRITES = 32
    LIST_BYTES = 256 << 10

# What is waited for.
WAIT_RECEIVE = 1
WAIT_SEND = 2
WAIT_WRITES = 3
WAIT_ROOM = 4

# How a wait ended.
DONE = 0
TIMED_OUT = 1
CM_EVENT = 2
CANCELLED = 3
FAILED = 4
SILENT = 5
INTERRUPTED = 6
NEED_KEY = 7

cdef enum:
    _WAIT_RECEIVE = 1
    _WAIT_SEND = 2
    _WAIT_WRITES = 3
    _WAIT_ROOM = 4
    _DONE = 0
    _TIMED_OUT = 1
    _CM_EVENT = 2
    _CANCELLED = 3
    _FAILED = 4
    _SILENT = 5
    _INTERRUPTED = 6
    _NEED_KEY = 7

KINDS = {KIND_WRITE: "RDMA write", KIND_SEND: "send", KIND_RECEIVE: "receive",
         KIND_PROBE: "liveness probe"}


cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t> now.tv_sec * 1000000000 + now.tv_nsec


cdef class WorkQueue:
    """Posts to one queue pair and waits for it, with the GIL released.

    Its completion queue serves sends, writes and receives alike; the caller keeps qp, cq and the
    registered control memory alive, and calls from one thread only.

    Args:
        qp, cq: pyverbs QP and CQ; the CQ has a completion channel and room for all requests.
        cm_fd: descriptor that is readable when a connection event is due.
        cancel_fd: eventfd that is readable once the migration is cancelled.
        region: MemoryRegion of ``(slots + 1) * slot_size`` bytes: the receive slots, then the
            slot that messages are sent from.
        slots: number of receive slots, 1 to 16.
        slot_size: bytes of a slot.
        depth: entries of the send queue.
        probe_ms: after so long without a sign of life a zero-length write is sent; it needs no
            key and no receive (InfiniBand specification, C9-88) and fails when the peer's host or
            process is gone. 0: none.
        silence_ms: a probe that is not answered for so long ends the wait with SILENT.
        iwarp: a request completes when TCP has taken it, whether or not the peer still lives. So
            the probe is a zero-length read there, which only the peer can complete, and requests
            of which none completes for probe_ms + silence_ms end the wait as well.
    """

    cdef object keep
    cdef rdma_mig_handle *qp_wrapper
    cdef rdma_mig_handle *cq_wrapper
    cdef MemoryRegion region
    cdef ibv_qp *qp
    cdef ibv_cq *cq
    cdef int cm_fd
    cdef int cancel_fd
    cdef int completion_fd
    cdef bint armed
    cdef int slots
    cdef uint32_t slot_size
    cdef uint32_t write_limit
    cdef uint32_t writes_outstanding  # with those that are listed and not yet posted
    cdef uint32_t sends_outstanding
    cdef ibv_send_wr writes[LIST_WRITES]
    cdef ibv_sge write_entries[LIST_WRITES]
    cdef int listed
    cdef uint64_t listed_bytes
    cdef uint32_t unsignaled  # posted, and counted by the completion of a write behind them
    cdef bint probe_outstanding
    cdef int64_t probe_ns
    cdef int64_t silence_ns
    cdef int64_t probe_sent
    cdef int64_t last_sign
    cdef bint iwarp
    cdef int received_slot[MAX_SLOTS]
    cdef uint32_t received_length[MAX_SLOTS]
    cdef int received_first
    cdef int received_count
    cdef int failed_status
    cdef int failed_kind
    cdef uint32_t failed_vendor
    cdef bint has_failed
    cdef bint send_failed
    cdef bint write_failed
    cdef readonly uint64_t completions
    cdef int64_t began  # when the wait began that goes on or was the last; 0: it was met at once
    cdef bint was_met

    def __init__(self, qp, cq, *, int cm_fd, int cancel_fd, MemoryRegion region not None,
                 int slots, uint32_t slot_size, uint32_t depth, int probe_ms, int silence_ms,
                 bint iwarp=False):
        if self.qp_wrapper != NULL:
            raise ValueError("this work queue has been set up already")
        if not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"slots must be 1 to {MAX_SLOTS}, not {slots}")
        if region.length < <uint64_t> (slots + 1) * slot_size:
            raise ValueError("the control region is smaller than its slots")
        if depth < 2 * CONTROL_RESERVE:
            raise ValueError(f"the send queue must have {2 * CONTROL_RESERVE} entries or more")
        if probe_ms < 0 or silence_ms < 0:
            raise ValueError("probe_ms and silence_ms must not be negative")
        region.require_open()
        self.qp = qp_handle(qp)
        self.cq = cq_handle(cq)
        if self.cq.channel == NULL:
            raise ValueError("the completion queue has no completion channel")
        self.keep = (qp, cq)
        self.completion_fd = self.cq.channel.fd
        cdef int flags = fcntl(self.completion_fd, F_GETFL)
        if flags < 0 or fcntl(self.completion_fd, F_SETFL, flags | O_NONBLOCK) < 0:
            raise OSError(errno, f"fcntl: {strerror(errno).decode()}")
        self.region = region
        self.cm_fd = cm_fd
        self.cancel_fd = cancel_fd
        self.slots = slots
        self.slot_size = slot_size
        self.write_limit = depth - CONTROL_RESERVE
        self.probe_ns = <int64_t> probe_ms * 1000000
        self.silence_ns = <int64_t> silence_ms * 1000000
        self.last_sign = monotonic_ns()
        self.iwarp = iwarp
        self.cq_wrapper = <rdma_mig_handle *> <PyObject *> cq
        self.qp_wrapper = <rdma_mig_handle *> <PyObject *> qp

    cdef bint is_open(self) noexcept nogil:
        # pyverbs clears its pointer when it destroys the object behind it, and ours dangles.
        return (self.qp_wrapper != NULL and self.qp_wrapper.raw == self.qp
                and self.cq_wrapper.raw == self.cq and self.region.mr != NULL)

    cdef int require_open(self) except -1:
        if not self.is_open():
            raise ValueError("the connection of this work queue is closed")
        return 0

    # ---- posting ----

    def post_receive(self, int slot) -> None:
        """Post a receive into a slot (its earlier content is lost)."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot}")
        self.require_open()
        cdef ibv_sge sge
        cdef ibv_recv_wr wr
        cdef ibv_recv_wr *bad
        sge.addr = self.region.address + <uint64_t> slot * self.slot_size
        sge.length = self.slot_size
        sge.lkey = self.region.mr.lkey
        memset(&wr, 0, sizeof(wr))
        wr.wr_id = (<uint64_t> KIND_RECEIVE << KIND_SHIFT) | <uint64_t> slot
        wr.sg_list = &sge
        wr.num_sge = 1
        cdef int result = ibv_post_recv(self.qp, &wr, &bad)
        if result != 0:
            raise OSError(result, f"ibv_post_recv: {strerror(result).decode()}")

    def post_send(self, bytes message) -> None:
        """Send one message; wait for WAIT_SEND before the next, since they share a buffer."""
        cdef size_t length = len(message)
        if length > self.slot_size:
            raise ValueError(f"a message of {length} bytes does not fit {self.slot_size}")
        if self.sends_outstanding:
            raise ValueError("the message before this one is still under way")
        self.require_open()
        cdef ibv_sge sge
        sge.addr = self.region.address + <uint64_t> self.slots * self.slot_size
        sge.length = <uint32_t> length
        sge.lkey = self.region.mr.lkey
        memcpy(<void *> sge.addr, <const char *> message, length)
        cdef int result = self.post_writes()
        if result == 0:
            result = self.post(KIND_SEND, &sge, 1, IBV_WR_SEND, 0, 0)
        if result != 0:
            raise OSError(result, f"ibv_post_send: {strerror(result).decode()}")
        self.sends_outstanding += 1

    cdef int post(self, int kind, ibv_sge *sge, int count, int opcode, uint64_t remote,
                  uint32_t rkey) noexcept nogil:
        cdef ibv_send_wr wr
        cdef ibv_send_wr *bad
        if not self.is_open():
            return EBADF
        if self.iwarp and self.writes_outstanding == 0 and self.sends_outstanding == 0:
            self.last_sign = monotonic_ns()  # its silence counts from the first request on
        memset(&wr, 0, sizeof(wr))
        wr.wr_id = <uint64_t> kind << KIND_SHIFT
        wr.sg_list = sge
        wr.num_sge = count
        wr.opcode = opcode
        wr.send_flags = IBV_SEND_SIGNALED
        wr.remote_addr = remote
        wr.remote_key = rkey
        return ibv_post_send(self.qp, &wr, &bad)

    cdef int write(self, const ibv_sge *entry, uint64_t remote, uint32_t rkey) noexcept nogil:
        """List one write, and post the list when it is full; there is room for one more."""
        cdef ibv_send_wr *wr = &self.writes[self.listed]
        self.write_entries[self.listed] = entry[0]
        memset(wr, 0, sizeof(wr[0]))
        wr.sg_list = &self.write_entries[self.listed]
        wr.num_sge = 1
        wr.opcode = IBV_WR_RDMA_WRITE
        wr.remote_addr = remote
        wr.remote_key = rkey
        self.listed += 1
        self.listed_bytes += entry.length
        self.writes_outstanding += 1
        if self.listed == LIST_WRITES or self.listed_bytes >= LIST_BYTES:
            return self.post_writes()
        return 0

    cdef int post_writes(self) noexcept nogil:
        """Post what is listed; 0, or an error number: ENOMEM, and nothing is noted, for no room."""
        cdef ibv_send_wr *bad = NULL
        cdef int i, result, posted
        if self.listed == 0:
            return 0
        if not self.is_open():
            self.note_failure(-EBADF, KIND_WRITE, 0)
            return EBADF
        if (self.iwarp and self.writes_outstanding == <uint32_t> self.listed
                and self.sends_outstanding == 0):
            self.last_sign = monotonic_ns()  # its silence counts from the first request on
        for i in range(self.listed):
            self.writes[i].wr_id = <uint64_t> KIND_WRITE << KIND_SHIFT
            self.writes[i].send_flags = 0
            self.writes[i].next = &self.writes[i + 1]
        i = self.listed - 1
        # It completes when all before it have, and counts them.
        self.writes[i].wr_id |= self.unsignaled + <uint32_t> self.listed
        self.writes[i].send_flags = IBV_SEND_SIGNALED
        self.writes[i].next = NULL
        result = ibv_post_send(self.qp, &self.writes[0], &bad)
        if result == 0:
            self.unsignaled = 0
            self.listed = 0
            self.listed_bytes = 0
            return 0
        posted = 0
        while posted < self.listed and &self.writes[posted] != bad:
            posted += 1
        if result != ENOMEM or self.writes_outstanding == <uint32_t> (self.listed - posted):
            self.note_failure(-result, KIND_WRITE, 0)
            return result
        # The device's queue is shorter than it said: take what fits as the limit.
        self.unsignaled += posted
        self.listed -= posted
        self.write_limit = self.writes_outstanding - self.listed
        for i in range(self.listed):
            self.write_entries[i] = self.write_entries[i + posted]
            self.writes[i] = self.writes[i + posted]
            self.writes[i].sg_list = &self.write_entries[i]
        return ENOMEM

    # ---- what has arrived ----

    def next_received(self):
        """Return the oldest received message as bytes and post its slot again; None: none."""
        if self.received_count == 0:
            return None
        self.require_open()
        cdef int slot = self.received_slot[self.received_first]
        cdef uint32_t length = self.received_length[self.received_first]
        self.received_first = (self.received_first + 1) % MAX_SLOTS
        self.received_count -= 1
        cdef const char *start = <const char *> (
            self.region.address + <uint64_t> slot * self.slot_size)
        message = start[:length]
        self.post_receive(slot)
        return message

    @property
    def failure(self):
        """(what failed, status number, the library's words, vendor code); None: nothing failed."""
        if not self.has_failed:
            return None
        return (KINDS.get(self.failed_kind, "work request"), self.failed_status,
                ibv_wc_status_str(self.failed_status).decode(), self.failed_vendor)

    @property
    def outstanding_writes(self) -> int:
        return self.writes_outstanding

    @property
    def outstanding_sends(self) -> int:
        return self.sends_outstanding

    # ---- waiting ----

    cdef int poll_completions(self) noexcept nogil:
        """Take in all completions that are there; return how many."""
        cdef ibv_wc wc[POLL_BATCH]
        cdef int count, i, kind, total = 0
        if not self.is_open():
            self.note_failure(-EBADF, 0, 0)
            return 0
        while True:
            count = ibv_poll_cq(self.cq, POLL_BATCH, wc)
            if count < 0:
                self.note_failure(-1, 0, 0)
                return total
            for i in range(count):
                kind = <int> (wc[i].wr_id >> KIND_SHIFT)
                if kind == KIND_WRITE:
                    self.writes_outstanding -= <uint32_t> wc[i].wr_id  # its low half
                    self.write_failed |= wc[i].status != IBV_WC_SUCCESS
                elif kind == KIND_SEND:
                    self.sends_outstanding -= 1
                    self.send_failed |= wc[i].status != IBV_WC_SUCCESS
                elif kind == KIND_PROBE:
                    self.probe_outstanding = False
                if wc[i].status != IBV_WC_SUCCESS:
                    self.note_failure(wc[i].status, kind, wc[i].vendor_err)
                elif kind == KIND_RECEIVE and self.received_count < MAX_SLOTS:
                    self.push_received(<int> (wc[i].wr_id & 0xff), wc[i].byte_len)
            total += count
            if count < POLL_BATCH:
                break
        if total:
            self.completions += total
            self.last_sign = monotonic_ns()
        return total

    cdef void push_received(self, int slot, uint32_t length) noexcept nogil:
        cdef int last = (self.received_first + self.received_count) % MAX_SLOTS
        self.received_slot[last] = slot
        self.received_length[last] = length
        self.received_count += 1

    cdef void note_failure(self, int status, int kind, uint32_t vendor) noexcept nogil:
        # The first failure says why; the flushed requests behind it only say that it happened.
        if self.has_failed and self.failed_status != IBV_WC_WR_FLUSH_ERR:
            return
        self.has_failed = True
        self.failed_status = status
        self.failed_kind = kind
        self.failed_vendor = vendor

    cdef bint satisfied(self, int what) noexcept nogil:
        if what == _WAIT_RECEIVE:
            return self.received_count > 0
        if what == _WAIT_SEND:
            return self.sends_outstanding == 0 and not self.send_failed
        if what == _WAIT_WRITES:
            return self.writes_outstanding == 0 and not self.write_failed
        return (self.writes_outstanding < self.write_limit and self.listed < LIST_WRITES
                and not self.write_failed)

    cdef int64_t probe(self, int64_t now) noexcept nogil:
        """Look after liveness; return the time to look again, 0 for never, -1 for silence."""
        cdef ibv_sge nowhere
        cdef int posted
        if self.probe_ns == 0:
            return 0
        if self.probe_outstanding:
            if now - self.probe_sent >= self.silence_ns:
                return -1
            return self.probe_sent + self.silence_ns
        # A request that is under way is as good as a probe: it completes or fails. Over TCP it may
        # do neither for a quarter of an hour.
        if self.writes_outstanding or self.sends_outstanding:
            if not self.iwarp:
                return now + self.probe_ns
            if now - self.last_sign >= self.probe_ns + self.silence_ns:
                return -1
            return self.last_sign + self.probe_ns + self.silence_ns
        if now - self.last_sign < self.probe_ns:
            return self.last_sign + self.probe_ns
        if self.iwarp:
            # Providers want an entry of our own memory, be it empty.
            nowhere.addr = self.region.address
            nowhere.length = 0
            nowhere.lkey = self.region.mr.lkey
            posted = self.post(KIND_PROBE, &nowhere, 1, IBV_WR_RDMA_READ, 0, 0)
        else:
            posted = self.post(KIND_PROBE, NULL, 0, IBV_WR_RDMA_WRITE, 0, 0)
        if posted == 0:
            self.probe_outstanding = True
            self.probe_sent = now
        return now + self.silence_ns

    cdef int wait_nogil(self, int what, int64_t deadline) noexcept nogil:
        cdef pollfd fds[3]
        cdef int64_t now, until, look
        cdef int result
        cdef ibv_cq *cq
        cdef void *context
        cdef timespec timeout
        while True:
            self.poll_completions()
            self.post_writes()
            if self.satisfied(what):
                return _DONE
            if self.has_failed:
                return _FAILED
            now = monotonic_ns()
            if self.began == 0:
                self.began = now
            if deadline and now >= deadline:
                return _TIMED_OUT
            if not self.armed:
                # Completions that came before the queue was armed raise no event: look again.
                if ibv_req_notify_cq(self.cq, 0) != 0:
                    self.note_failure(-1, 0, 0)
                    return _FAILED
                self.armed = True
                continue
            look = self.probe(now)
            if look < 0:
                return _SILENT
            until = deadline
            if look and (until == 0 or look < until):
                until = look
            fds[0].fd = self.completion_fd
            fds[1].fd = self.cm_fd
            fds[2].fd = self.cancel_fd
            for result in range(3):
                fds[result].events = POLLIN
                fds[result].revents = 0
            if until:
                timeout.tv_sec = (until - now) // 1000000000 if until > now else 0
                timeout.tv_nsec = (until - now) % 1000000000 if until > now else 0
                result = ppoll(fds, 3, &timeout, NULL)
            else:
                result = ppoll(fds, 3, NULL, NULL)
            if result < 0:
                if errno == EINTR:
                    return _INTERRUPTED
                self.note_failure(-1, 0, <uint32_t> errno)
                return _FAILED
            if fds[2].revents:
                return _CANCELLED
            if fds[0].revents:
                while ibv_get_cq_event(self.cq.channel, &cq, &context) == 0:
                    ibv_ack_cq_events(cq, 1)
                self.armed = False
                continue  # what has arrived goes before what the connection says
            if fds[1].revents:
                return _CM_EVENT

    def poll(self) -> int:
        """Take in what has completed, without waiting; return the number of completions."""
        cdef int count
        self.require_open()
        with nogil:
            count = self.poll_completions()
        return count

    def wait(self, int what, int64_t deadline_ns) -> int:
        """Wait until ``what`` holds; return DONE or why the wait ended before.

        deadline_ns is on CLOCK_MONOTONIC, 0 for none. A signal's Python handler runs, and the
        wait goes on.
        """
        cdef int result
        self.require_open()
        if self.was_met:
            self.began = 0
        while True:
            with nogil:
                result = self.wait_nogil(what, deadline_ns)
            if result != _INTERRUPTED:
                self.was_met = result == _DONE
                return result
            PyErr_CheckSignals()

    @property
    def waiting_since(self) -> float:
        """When the last wait() began, of time.monotonic(); 0 when it was met at once.

        One that was broken off and taken up again counts from its beginning.
        """
        return self.began / 1e9
