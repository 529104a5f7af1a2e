# SPDX-License-Identifier: Apache-2.0
"""The destination's end of the RDMA transport: a byte channel, and the RAM hooks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rdma_mig import _pages
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import AT_SOURCE
from rdma_mig.errors import LocalProtocolError, PeerGone, RemoteProtocolError
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import CHUNK_SIZE, chunk_range
from rdma_mig.memory.ram import GuestRam
from rdma_mig.transport.control import ControlChannel
from rdma_mig.transport.return_path import ReturnPathWriter
from rdma_mig.transport.side_connections import SideConnections, granted_beside, side_options
from rdma_mig.verbs.endpoint import Endpoint, EndpointOptions
from rdma_mig.verbs.listener import Admission, Listener
from rdma_mig.verbs.route import Route, route_of
from rdma_mig.waits import Cancel, Deadline, TransportLimits
from rdma_mig.wire.address import RdmaAddress
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    FinalAck,
    RamBlockRecord,
    RegisterResult,
    ZeroRun,
    check_register,
    check_unregister,
    check_zero_run,
    decode_register_requests,
    encode_ram_blocks,
)
from rdma_mig.wire.handshake import (
    FEATURE_FINAL_ACK,
    FEATURE_FRESH_BLOCKS,
    FLAG_PIN_ALL,
    PrivateData,
)
from rdma_mig.wire.return_path import Pong, Shut

if TYPE_CHECKING:
    from rdma_mig import _verbs

__all__ = ["IncomingListener", "RdmaIncoming"]

# What the source knows depends on which message it got last, and only it can tell.
_HANDED_OVER = (
    "the source may have let go of its virtual machine: if it is in postmigrate (`info status` "
    "there), `cont` there resumes it, and else it runs on by itself"
)

_FEATURES = FEATURE_FINAL_ACK | FEATURE_FRESH_BLOCKS

_HOOK = 2  # RAM_CONTROL_HOOK
_BLOCK_REG = 4  # RAM_CONTROL_BLOCK_REG


class IncomingListener:
    """Listens for one source; a context manager.

    Args:
        address: where; port 0 takes a free one.
        cancel: ends every wait.
        options: sizes and limits of the connection.
        guard: says of a client's numeric host why it is not served; None to serve everybody.
        refused: told of a client that was not served, and why; the guard tells of its own.

    Attributes:
        address: as bound.
        device: name of the device that it belongs to; empty where it is every address.

    Raises:
        HostError: this host cannot listen there.
    """

    def __init__(
        self,
        address: RdmaAddress,
        cancel: Cancel,
        options: EndpointOptions,
        guard: Callable[[str], str] | None = None,
        refused: Callable[[str, str], None] | None = None,
    ) -> None:
        self._options = options
        self._listener = Listener(address.host, address.port, cancel, options, guard, refused)
        self.address = RdmaAddress(*self._listener.address)
        self.device = self._listener.device

    def accept(self, deadline: Deadline, limits: TransportLimits) -> RdmaIncoming:
        """Wait for a source and accept it; afterwards only its other connections are taken.

        A source opens them right after the first connection and before it sends any byte of the
        stream (docs/protocol.md, return path, several connections). So the door is open until the
        first byte comes, to the source's address only; where the source is one of ours, also to
        its nonce only. A client that speaks another version is told so and turned away.

        Raises:
            HostError, MigrationTimeout, MigrationCancelled: no connection came about.
        """
        asked: list[PrivateData] = []

        def reply_to(request: PrivateData) -> bytes:
            extension = request.extension
            if extension is not None:
                # The nonce goes back as it came: it names this connection to both ends.
                extension = replace(
                    extension,
                    features=extension.features & _FEATURES,
                    beside=granted_beside(request),
                )
            return PrivateData(1, request.flags & FLAG_PIN_ALL, extension).encode()

        def answer(private_data: bytes, peer: str) -> bytes:
            request = PrivateData.decode(private_data)
            asked.append(request)
            return reply_to(request)

        def admit(private_data: bytes, peer: str) -> Admission:
            request = PrivateData.decode(private_data)
            first = asked[-1]
            nonce, known = (data.extension and data.extension.nonce for data in (request, first))
            if nonce != known or request.pin_all != first.pin_all:
                raise RemoteProtocolError("another migration is under way")
            beside = granted_beside(first)
            number = request.extension.number if request.extension else 0
            if number > beside or number in self._listener.others:
                raise RemoteProtocolError(
                    f"connection {number} of a migration that has {beside} beside the first"
                    + (", and has this one" if number <= beside else "")
                )
            return Admission(
                reply_to(request),
                number,
                side_options(self._options) if number else None,
                shares_memory=number > 0,
                # The return path is one of them.
                last=len(self._listener.others) == beside,
            )

        endpoint = self._listener.accept(answer, deadline, admit)
        return RdmaIncoming(endpoint, asked[-1], limits, self._listener)

    def close(self) -> None:
        """Stop listening; after the connection was closed. Idempotent."""
        self._listener.close()


class RdmaIncoming:
    """A connected destination. Used from one thread; close() ends the connection.

    Attributes:
        pin_all: both ends pin all RAM.
        final_ack: the source waits for a final acknowledgement.
        phases: registration phases served: setup, rounds and the last one.
        setup_seconds: populating and registering RAM.
    """

    at_source = AT_SOURCE
    handed_over = _HANDED_OVER
    source_lets_go = True
    end_is_sure = True

    def __init__(
        self,
        endpoint: Endpoint,
        asked: PrivateData,
        limits: TransportLimits,
        listener: Listener,
    ) -> None:
        self._endpoint = endpoint
        self._cancel = endpoint.cancel
        self._limits = limits
        self._listener = listener
        self._return_path: ReturnPathWriter | None = None
        self._streaming = False
        self._trace = endpoint.trace
        self._commits = False
        self.control = ControlChannel(endpoint, limits)
        self.pin_all = asked.pin_all
        self.final_ack = bool(asked.extension and asked.extension.features & FEATURE_FINAL_ACK)
        self._beside = granted_beside(asked)
        self._side: SideConnections | None = None
        self._says_fresh = bool(asked.extension and asked.extension.features & FEATURE_FRESH_BLOCKS)
        self.phases = 0
        self.setup_seconds = 0.0
        self._ram: GuestRam | None = None
        self._names: list[str] = []
        self._exchanged = False
        # (block, first chunk) -> its region, and how many chunks beyond the first it covers.
        self._chunks: dict[tuple[int, int], tuple[_verbs.MemoryRegion, int]] = {}

    @property
    def peer(self) -> str:
        """HOST:PORT of the source."""
        return self._endpoint.peer

    @property
    def device(self) -> str:
        """Name of the verbs device that the connection uses."""
        return self._endpoint.device

    @property
    def route(self) -> Route:
        """Where the connection runs."""
        return route_of(self._endpoint.cmid, self._endpoint.path)

    @property
    def connections(self) -> int:
        """Over how many the source writes RAM."""
        return 1 + self._beside

    @property
    def disconnected(self) -> bool:
        """Whether the source has ended the connection."""
        return self._endpoint.disconnected

    @property
    def went_on(self) -> bool:
        """Whether the source took the RAM blocks that it was offered."""
        return self.phases > 0

    def attach(self, ram: GuestRam) -> None:
        """Say where RAM shall arrive; it must outlive the registrations."""
        self._ram = ram

    # ---- ByteChannel ----

    def read(self) -> bytes:
        """Ask for, and wait for, the next bytes of the stream; empty when it has ended."""
        self.control.grant()
        if self._commits and self._trace is not None:
            self._trace.record("commit", role="destination", by="READY", state="passed")
        self._commits = False
        message = self.control.await_any("the next part of the migration stream")
        if message.type is ControlType.STREAM_END and self.final_ack:
            return b""
        if message.type is not ControlType.QEMU_FILE:
            raise RemoteProtocolError(
                f"{self.peer} sent {message.type.name} where QEMU_FILE was due"
            )
        if not self._streaming:
            # The source is through with connecting.
            self._streaming = True
            self._listener.stop()
        return message.payload

    def write(self, data: bytes) -> None:
        """A destination's stream runs one way."""
        raise LocalProtocolError("a destination does not write the stream")

    def next_ready_commits(self) -> None:
        """Note that the READY which read() grants next lets the source go; for the trace."""
        if self._trace is not None:
            self._trace.record("commit", role="destination", by="READY", state="before")
        self._commits = True

    # ---- RamControlHooks ----

    def before_iterate(self, file: QEMUFile, flags: int) -> None:
        """Only a source saves."""
        raise LocalProtocolError("a destination does not save")

    def after_iterate(self, file: QEMUFile, flags: int) -> None:
        """Only a source saves."""
        raise LocalProtocolError("a destination does not save")

    def save_page(self, block_offset: int, offset: int, size: int) -> None:
        """Only a source saves."""
        raise LocalProtocolError("a destination does not save")

    def save_pages(self, block_offset: int, dirty: DirtyBitmap | None) -> int:
        """Only a source saves."""
        raise LocalProtocolError("a destination does not save")

    def load_hook(self, file: QEMUFile, flags: int, data: object) -> None:
        """Note a block's name (BLOCK_REG), or serve a registration phase (HOOK)."""
        if flags == _BLOCK_REG:
            self._names.append(str(data))
        elif flags == _HOOK:
            self._serve_phase()
        else:
            raise LocalProtocolError(f"load hook with flags {flags}")

    def _serve_phase(self) -> None:
        """Answer requests until the source ends the phase (docs/protocol.md, RAM phases)."""
        if self._ram is None:
            raise LocalProtocolError("a registration phase before the RAM is known")
        side = self._side_connections()
        self._note_phase("begin")
        while True:
            message = self.control.receive("a registration request or the end of the RAM phase")
            match message.type:
                case ControlType.RAM_BLOCKS_REQUEST:
                    self._answer_blocks(self._ram)
                case ControlType.REGISTER_FINISHED:
                    if not self._exchanged:
                        raise RemoteProtocolError(
                            f"{self.peer} ended setup without asking for the RAM blocks"
                        )
                    side.await_phase_end()
                    self._note_phase("end")
                    self.phases += 1
                    return
                case ControlType.REGISTER_REQUEST if self._exchanged and not self.pin_all:
                    self._answer_register(self._ram, message)
                case ControlType.COMPRESS if self._exchanged and not self.pin_all:
                    self._clear(self._ram, message)
                case ControlType.UNREGISTER_REQUEST if self._exchanged and not self.pin_all:
                    self._answer_unregister(self._ram, message)
                case _:
                    raise RemoteProtocolError(
                        f"{self.peer} sent {message.type.name} in a registration phase"
                    )

    def _side_connections(self) -> SideConnections:
        """Return them; the source has opened them all before the first byte of the stream."""
        if self._side is None:
            numbers = range(1, self._beside + 1)
            others = self._listener.others
            if missing := [number for number in numbers if number not in others]:
                raise RemoteProtocolError(
                    f"{self.peer} announced {self._beside} connections beside the first, and did "
                    f"not open number {missing[0]}"
                )
            self._side = SideConnections([others[number] for number in numbers], self._limits)
        return self._side

    def _note_phase(self, state: str) -> None:
        if self._trace is not None:
            self._trace.record("phase", number=self.phases, state=state)

    def _answer_blocks(self, ram: GuestRam) -> None:
        if self._exchanged:
            raise RemoteProtocolError(f"{self.peer} asked twice for the RAM blocks")
        if self._names != [guest.block.idstr for guest in ram]:
            raise LocalProtocolError("the RAM blocks were not announced in stream order")
        began = time.monotonic()
        keys = [0] * len(ram)
        # Asked before the memory is populated, when its being all zero still shows.
        fresh = [self._says_fresh and guest.memory.next_data(0) is None for guest in ram]
        if self.pin_all:
            ram.populate(lambda: self._cancel.requested)
            if self._trace is not None:
                seconds = round(time.monotonic() - began, 6)
                self._trace.record("populate", bytes=ram.total, seconds=seconds)
            for guest in ram:
                keys[guest.index] = self._endpoint.register(
                    guest.memory.address,
                    guest.block.length,
                    what=f"RAM block {guest.block.idstr}",
                    remote_write=True,
                    holder=guest.memory.hold("its memory region"),
                ).rkey
        records = [
            RamBlockRecord(
                guest.memory.address,
                guest.offset,
                guest.block.length,
                keys[guest.index],
                fresh[guest.index],
            )
            for guest in ram
        ]
        self.setup_seconds += time.monotonic() - began
        self.control.post(ControlMessage(ControlType.RAM_BLOCKS_RESULT, encode_ram_blocks(records)))
        self._exchanged = True

    # ---- dynamic registration ----

    def _extents(self, ram: GuestRam) -> list[tuple[int, int]]:
        return [(guest.offset, guest.block.length) for guest in ram]

    def _answer_register(self, ram: GuestRam, message: ControlMessage) -> None:
        """Register what is asked for and no more, once a chunk; answer with the key."""
        results = []
        for record in decode_register_requests(message.payload):
            first = check_register(record, self._extents(ram)).start
            guest = ram[record.block_index]
            key = (guest.index, first)
            region = self._chunks.get(key)
            if region is not None and region[1] < record.chunks:
                # The wider range takes the place of the narrower one, whose key dies with it:
                # otherwise growing requests could pin the same memory over and over.
                self._endpoint.deregister(region[0])
                region = None
            if region is None:
                start, _size = chunk_range(first, guest.block.length)
                last, size = chunk_range(first + record.chunks, guest.block.length)
                region = (
                    self._endpoint.register(
                        guest.memory.address + start,
                        last + size - start,
                        what=f"RAM block {guest.block.idstr}",
                        remote_write=True,
                        holder=guest.memory.hold("its memory region"),
                        chunk=first,
                    ),
                    record.chunks,
                )
                self._chunks[key] = region
            results.append(RegisterResult(region[0].rkey, guest.memory.address).encode())
        self.control.post(
            ControlMessage(ControlType.REGISTER_RESULT, b"".join(results), message.repeat)
        )

    def _answer_unregister(self, ram: GuestRam, message: ControlMessage) -> None:
        """Withdraw the keys of chunks: a write with an old one fails from now on."""
        for record in decode_register_requests(message.payload):
            for chunk in check_unregister(record, self._extents(ram)):
                region = self._chunks.pop((record.block_index, chunk), None)
                if region is not None:
                    self._endpoint.deregister(region[0])
        self.control.post(ControlMessage(ControlType.UNREGISTER_FINISHED, repeat=message.repeat))

    def _clear(self, ram: GuestRam, message: ControlMessage) -> None:
        """Make a range zero, without allocating what was never written."""
        run = ZeroRun.decode(message.payload)
        start = check_zero_run(run, self._extents(ram))
        guest = ram[run.block_index]
        end = start + run.length
        with guest.memory.view() as view:
            at = guest.memory.next_data(start)
            while at is not None and at < end:
                stop = min(at + CHUNK_SIZE, end)
                with view[at:stop] as part:
                    if not _pages.is_zero(part):
                        part[:] = bytes(len(part))
                at = guest.memory.next_data(stop)

    @contextlib.contextmanager
    def silence_limited(self, seconds: float) -> Iterator[None]:
        """Let the source be silent for so long at most, within this block."""
        before = self._limits.stall
        self._limits.stall = min(seconds, before or seconds)
        try:
            yield
        finally:
            self._limits.stall = before

    # ---- the return path ----

    @property
    def has_return_path(self) -> bool:
        """Whether the source waits for this end's word before it lets go of its guest."""
        return self._return_path is not None

    def open_return_path(self) -> bool:
        """Do as the stream's OPEN_RETURN_PATH says; False if the source opened no connection."""
        second = self._listener.others.get(0)
        if second is not None and self._return_path is None:
            self._return_path = ReturnPathWriter(second, self._limits)
        return self._return_path is not None

    def pong(self, value: int) -> None:
        """Answer the stream's PING; there must be a return path."""
        self._require_return_path().send(Pong(value))

    def shut(self, seconds: float) -> None:
        """Tell the source that everything is whole and on disk: it lets go of its guest.

        Args:
            seconds: how long the source may take to end the connection when it has heard it.

        Raises:
            PeerGone, MigrationTimeout, MigrationCancelled: it may or may not have heard it; or it
                has failed or was cancelled at the same moment.
        """
        self._require_return_path().send(Shut(0))
        left = self._endpoint.wait_disconnected(seconds)
        if self._endpoint.iwarp and not left:
            # Sent means handed to TCP there, and not arrived.
            raise PeerGone(f"{self.peer} was told that all is on disk and does not leave")
        # A source that is cancelled meanwhile runs its guest again, and tells us so at most.
        if self.control.peer_error():
            raise PeerGone(f"{self.peer} failed or was cancelled while it was told")

    def _require_return_path(self) -> ReturnPathWriter:
        if self._return_path is None:
            raise LocalProtocolError("there is no return path")
        return self._return_path

    # ---- the end ----

    def withdraw_keys(self) -> None:
        """Deregister all RAM: from here on nobody but this process can change it."""
        self._endpoint.deregister_all()
        self._chunks.clear()

    def acknowledge(self, ack: FinalAck) -> None:
        """Tell the source whether RAM and device state are whole and on disk."""
        self.control.post(ControlMessage(ControlType.FINAL_ACK, ack.encode()))

    def wait_disconnected(self, seconds: float) -> bool:
        """Let the source end the connection; return whether it did.

        Ours to end only then: a QEMU that has not yet seen its last message arrive takes our
        disconnecting for a failure.
        """
        return self._endpoint.wait_disconnected(seconds)

    def abort(self) -> None:
        """Tell the source that this end has failed, and end the connection."""
        if self._return_path is not None:
            self._return_path.try_send(Shut(1))
        self.control.send_error()
        self.close()

    def close(self) -> None:
        """End the connections and give back every registration. Idempotent."""
        for other in self._listener.others.values():
            other.close()
        self._endpoint.close()
