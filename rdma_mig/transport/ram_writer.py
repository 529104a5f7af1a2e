# SPDX-License-Identifier: Apache-2.0
"""The source's RAM in RDMA writes: keys, zeros, what is issued and when all of it is through."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rdma_mig import _pages
from rdma_mig.errors import MigrationTimeout, RemoteProtocolError
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import CHUNK_SIZE, chunk_of, chunk_range
from rdma_mig.memory.ram import GuestBlock, GuestRam
from rdma_mig.transport.control import ControlChannel
from rdma_mig.verbs.endpoint import Endpoint
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, TransportLimits
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    RamBlockRecord,
    RegisterRecord,
    ZeroRun,
    decode_ram_blocks,
    decode_register_results,
)

if TYPE_CHECKING:
    from rdma_mig.tracing import Observer

__all__ = ["RamWriter"]

# One write of all RAM would be quickest, but a wait could not be cancelled within it.
_MAX_WRITE = 16 << 20
# Smaller blocks are firmware and devices', which a QEMU fills before anything arrives.
_ASSUMED_ZERO = 64 << 20
# Chunks that are registered at once at most, where all of them hold data: a request takes a round
# trip, and the source waits for it.
_KEY_CHUNKS = 64
# Regions of their own that RAM at rest gets for what holds data; with more, blocks are registered
# as a whole: an adapter has only so many. A QEMU without pin-all needs as many for a GiB.
_MAX_EXTENTS = 1024


def _name(guest: GuestBlock) -> str:
    """What messages and the trace call a block's memory."""
    return f"RAM block {guest.block.idstr}"


def _data_extents(guest: GuestBlock) -> array[int]:
    """Return (start, length) of what has pages in a block's memory, one after the other."""
    extents = array("Q")
    for start, end in guest.memory.data_extents(guest.block.length, CHUNK_SIZE):
        extents.extend((start, end - start))
    return extents


class RamWriter:
    """Writes guest RAM to the destination's; used from one thread, the connection's.

    Args:
        endpoint: the connection; what is registered on it is given back with it.
        beside: other connections that share its memory, and the writes.
        control: its control channel, for keys and announcements.
        ram: the guest's RAM; it must outlive this object.
        cancel: ends every wait.
        limits: on the waits.
        pin_all: all RAM is registered at both ends in exchange_blocks(), but for what is zero here
            and stays so; else chunk by chunk.
        hears_fresh: the destination says which of its blocks are zero from the start.
        assume_zero: where it does not, large ones count as such.
        account: called with bytes and whether they are zero, for each run that is issued.

    Attributes:
        queue: takes pages while it is open: its page_taker.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        control: ControlChannel,
        ram: GuestRam,
        cancel: Cancel,
        limits: TransportLimits,
        *,
        pin_all: bool,
        hears_fresh: bool,
        assume_zero: bool,
        account: Callable[[int, bool], None],
        beside: Sequence[Endpoint] = (),
    ) -> None:
        self._verbs = load()
        self._endpoint = endpoint
        self._endpoints = (endpoint, *beside)
        self._control = control
        self._ram = ram
        self._cancel = cancel
        self._limits = limits
        self._pin_all = pin_all
        self._hears_fresh = hears_fresh
        self._assume_zero = assume_zero
        self._account = account
        self._trace = endpoint.trace
        self._zero_bytes = 0
        self._records: list[RamBlockRecord] = []
        self._extents: list[array[int]] = []
        self._pinned: list[tuple[int, range, int]] | None = None  # block, chunks, lkey
        self.queue = self._verbs.WriteQueue(
            endpoint.queue,
            beside=[other.queue for other in beside],
            chunk_size=CHUNK_SIZE,
            max_write=min(_MAX_WRITE, *(each.max_message for each in self._endpoints)),
            interrupted=self._interrupted,
            issued=self._issued,
        )
        self.queue.deadline_ns = limits.total.ns
        if self._trace is not None:
            self.queue.note_spans()

    @property
    def zero_bytes(self) -> int:
        """Bytes of zeros that were not written: announced, or the destination has them."""
        return self._zero_bytes + int(self.queue.zero_bytes)

    def _interrupted(self, outcome: int) -> None:
        if outcome == self._verbs.NEED_KEY:
            self._ask_for_key(*self.queue.wanted)
            return
        stopped = self._endpoints[self.queue.blocked]
        stopped.interrupted(outcome, "room in the send queue", self._limits.total)

    def _issued(self, size: int, zeros: int) -> None:
        if size:
            self._account(size, False)
        if zeros:
            self._account(zeros, True)
        if self._trace is not None:
            self._note_writes(self._trace)

    def _note_writes(self, trace: Observer) -> None:
        for index, first, last, writes, size, whole in self.queue.take_spans():
            trace.record(
                "write",
                block=_name(self._ram[index]),
                chunk=first,
                last=last,
                whole=whole,
                writes=writes,
                bytes=size,
            )

    # ---- pages ----

    def save_pages(self, block_offset: int, dirty: DirtyBitmap | None) -> int:
        """Write all dirty pages of a block, or the whole block, in as few writes as can be."""
        guest = self._ram.at_offset(block_offset)
        if dirty is None:
            return self._save_whole(guest)
        return sum(
            self._save_runs(guest, runs)
            for runs in dirty.runs(_MAX_WRITE, length=guest.block.length, boundary=0)
        )

    def _save_whole(self, guest: GuestBlock) -> int:
        """Write all of a block; of one that is zero at the destination, what has pages here."""
        length = guest.block.length
        extents = array("Q", [0, length])
        if self._records[guest.index].fresh:
            extents = self._extents[guest.index] if self._extents else _data_extents(guest)
        sent = self._save_runs(guest, memoryview(extents)) if extents else 0
        if sent < length:
            self._zero_bytes += length - sent
            self._issued(0, length - sent)
        return length

    def _save_runs(self, guest: GuestBlock, runs: memoryview) -> int:
        rows = runs.cast("B").cast("Q", [len(runs) // 2, 2])
        return int(self.queue.save_runs(guest.index, rows))

    def _ask_for_key(self, index: int, start: int, length: int) -> None:
        """Deal with a run in chunks that have no keys yet (docs/protocol.md, RAM phases).

        What is wholly zero needs none: the destination clears it by itself. Otherwise chunks are
        registered at both ends, as far as they hold data, and no others.
        """
        guest, record = self._ram[index], self._records[index]
        if self._pin_all:
            # Zeros of a block that is not zero at the destination, where all is registered.
            self._register_zeros(guest, start, length, record.rkey)
            return
        address = record.offset + start
        if zeros := self._zeros(guest, start, length):
            message = ZeroRun(0, index, address, zeros).encode()
            self._control.send(ControlMessage(ControlType.COMPRESS, message))
            self._zero_bytes += zeros
            self._issued(0, zeros)
            self.queue.skip(zeros)
            return
        chunk = chunk_of(start)
        last = chunk
        most = min(chunk_of(start + length - 1), chunk + _KEY_CHUNKS - 1)
        while last < most:
            at, size = chunk_range(last + 1, start + length)
            if self._zeros(guest, at, size):
                break
            last += 1
        chunks = range(chunk, last + 1)
        lkeys: list[int] = []
        reply = self._control.request(
            ControlMessage(
                ControlType.REGISTER_REQUEST,
                RegisterRecord(address, index, last - chunk).encode(),
            ),
            ControlType.REGISTER_RESULT,
            meanwhile=lambda: lkeys.append(self._register_chunks(guest, chunks)),
        )
        result = decode_register_results(reply.payload)[0]
        if result.host_address != record.host_address:
            raise RemoteProtocolError(
                f"{self._endpoint.peer} says that RAM block {index} lies at "
                f"{result.host_address:#x} and said {record.host_address:#x} before"
            )
        for each in chunks:
            self.queue.set_chunk_keys(index, each, lkeys[0], result.rkey)

    def _register_chunks(self, guest: GuestBlock, chunks: range) -> int:
        """Register chunks in a row; return the local key."""
        start, _ = chunk_range(chunks[0], guest.block.length)
        last, size = chunk_range(chunks[-1], guest.block.length)
        return self._endpoint.register(
            guest.memory.address + start,
            last + size - start,
            what=_name(guest),
            remote_write=False,
            holder=guest.memory.hold("its memory region"),
            chunk=chunks[0],
        ).lkey

    def _register_zeros(self, guest: GuestBlock, start: int, length: int, rkey: int) -> None:
        first = chunk_of(start)
        chunks = range(first, min(chunk_of(start + length - 1) + 1, first + _KEY_CHUNKS))
        lkey = self._register_chunks(guest, chunks)
        for chunk in chunks:
            self.queue.set_chunk_keys(guest.index, chunk, lkey, rkey)

    def _register_data(self) -> list[tuple[int, range, int]]:
        """Register what holds data, and nothing else.

        Returns:
            block, chunks and local key of each region.
        """
        pinned = []
        for guest in self._ram:
            rows = self._extents[guest.index]
            for start, size in zip(rows[::2], rows[1::2], strict=True):
                chunks = range(chunk_of(start), chunk_of(start + size - 1) + 1)
                pinned.append((guest.index, chunks, self._register_chunks(guest, chunks)))
        return pinned

    @staticmethod
    def _zeros(guest: GuestBlock, start: int, length: int) -> int:
        """Return how many bytes from ``start`` on are zero: all, or up to the border of a chunk.

        Memory without pages is zero, and not read: that would allocate them.
        """
        at, end = start, start + length
        with guest.memory.view() as view:
            while at < end:
                found = guest.memory.next_data(at)
                if found is None or found >= end:
                    return length
                border = chunk_of(found) * CHUNK_SIZE
                at, stop = max(at, border), min(border + CHUNK_SIZE, end)
                with view[found:stop] as part:
                    if not _pages.is_zero(part):
                        break
                at = stop
        return at - start

    # ---- setup, and the end of a phase ----

    def exchange_blocks(self) -> float:
        """Learn where the destination's blocks are; pin all RAM at both ends if that is agreed on.

        Returns:
            Seconds that this took.

        Raises:
            RemoteProtocolError: it has other blocks, or no key where it granted one.
            HostError: RAM cannot be allocated or registered.
        """
        began = time.monotonic()
        regions: list[tuple[int, int]] = [(guest.memory.address, 0) for guest in self._ram]

        def register() -> None:
            if not self._pin_all:
                return
            if self._ram.at_rest and (self._hears_fresh or self._assume_zero):
                # Zeros are not sent. Populated memory would have no holes any more, and be looked
                # through for zeros, which touches all of it.
                self._extents = [_data_extents(guest) for guest in self._ram]
                if sum(map(len, self._extents)) <= 2 * _MAX_EXTENTS:
                    self._pinned = self._register_data()
                    return
            populating = time.monotonic()
            self._ram.populate(lambda: self._cancel.requested)
            if self._trace is not None:
                seconds = round(time.monotonic() - populating, 6)
                self._trace.record("populate", bytes=self._ram.total, seconds=seconds)
            for guest in self._ram:
                region = self._endpoint.register(
                    guest.memory.address,
                    guest.block.length,
                    what=_name(guest),
                    remote_write=False,
                    holder=guest.memory.hold("its memory region"),
                )
                regions[guest.index] = (region.address, region.lkey)

        # Both ends pin at the same time: the destination while we wait for its answer.
        reply = self._control.request(
            ControlMessage(ControlType.RAM_BLOCKS_REQUEST),
            ControlType.RAM_BLOCKS_RESULT,
            meanwhile=register,
        )
        records = decode_ram_blocks(reply.payload, self._ram.lengths)
        if not self._hears_fresh:
            # What a QEMU sends there is padding.
            least = _ASSUMED_ZERO if self._assume_zero else math.inf
            records = [replace(record, fresh=record.length >= least) for record in records]
        for index, record in enumerate(records):
            if self._pin_all and record.rkey == 0:
                raise RemoteProtocolError(
                    f"{self._endpoint.peer} granted pin-all and sent no key for RAM block {index}"
                )
        self.queue.set_targets(
            [
                (address, lkey, record.host_address, record.rkey, record.length)
                for (address, lkey), record in zip(regions, records, strict=True)
            ],
            offsets=[guest.offset for guest in self._ram],
            dynamic=not self._pin_all or self._pinned is not None,
            fresh=[index for index, record in enumerate(records) if record.fresh],
        )
        for index, chunks, lkey in self._pinned or ():
            for chunk in chunks:
                self.queue.set_chunk_keys(index, chunk, lkey, records[index].rkey)
        self._records = records
        return time.monotonic() - began

    def wait_writes(self) -> None:
        """Wait until every write has completed; as long as some do, that is no stall."""
        began = time.monotonic() if self._trace is not None else 0.0
        for endpoint in self._endpoints:
            self._wait_writes_of(endpoint)
        if self._trace is not None:
            self._trace.waited("the completion of all writes", began, time.monotonic())

    def _wait_writes_of(self, endpoint: Endpoint) -> None:
        while True:
            before = endpoint.queue.completions
            try:
                endpoint.wait(
                    self._verbs.WAIT_WRITES,
                    "the completion of all writes",
                    self._limits.next_wait(),
                )
            except MigrationTimeout:
                if endpoint.queue.completions > before and not self._limits.total.passed:
                    continue
                raise
            return
