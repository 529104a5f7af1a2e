# SPDX-License-Identifier: Apache-2.0
"""The source's end of the RDMA transport: a byte channel, and the RAM hooks."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import replace

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import (
    LocalProtocolError,
    MigrationTimeout,
    PeerGone,
)
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.ram import GuestRam
from rdma_mig.transport.control import ControlChannel
from rdma_mig.transport.ram_writer import RamWriter
from rdma_mig.transport.return_path import ReturnPathReader
from rdma_mig.transport.side_connections import SideConnections, open_side_connections
from rdma_mig.verbs.connector import connect
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.verbs.route import Route, route_of
from rdma_mig.waits import Cancel, TransportLimits
from rdma_mig.wire.address import RdmaAddress
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    FinalAck,
)
from rdma_mig.wire.handshake import (
    FEATURE_FINAL_ACK,
    FEATURE_FRESH_BLOCKS,
    FLAG_PIN_ALL,
    Extension,
    PrivateData,
)
from rdma_mig.wire.return_path import RETURN_PATH_PING
from rdma_mig.wire.stream import encode_hook

__all__ = ["RETURN_PATH_PING", "STREAM_MESSAGE", "RdmaOutgoing"]

_SETUP = 0  # RAM_CONTROL_SETUP, migration.h's only flag with a meaning here

# Bytes of the stream in one message: what QEMU itself sends at most.
STREAM_MESSAGE = 32768

# How long a destination may take to accept a return path: as long as QEMU gives it.
_RETURN_PATH_SECONDS = 5.0

# A QEMU destination ends the connection itself, some 50 ms after the last byte.
_DISCONNECT_SECONDS = 5.0


class RdmaOutgoing:
    """A connected source. Used from one thread; close() ends the connection.

    Args:
        address: the destination.
        ram: the guest's RAM; it must outlive this object.
        cancel: ends every wait.
        options: sizes and limits of the connection.
        limits: on the waits once it is up.
        pin_all: ask for the registration of all RAM at the start; a destination that refuses it
            gets RAM chunk by chunk.
        assume_zero: send no zeros to large blocks of a destination that does not say which are
            zero, as a QEMU's main RAM is when it has just been started.
        return_path: open a second connection, on which the destination says how it ended.
        stream_message: bytes of the stream in one message at most, 1 to 524272.
        connections: over how many to write RAM, 1 to 16; a destination may grant fewer, and a QEMU
            takes one.

    Raises:
        PeerGone: there is no destination, or it offers no return path.
        HostError, MigrationTimeout, MigrationCancelled: as connect() has them.

    Attributes:
        peer: HOST:PORT of the destination.
        pin_all: both ends pin all RAM.
        final_ack: the destination says at the end whether RAM and state are whole and on disk.
        setup_seconds: populating, registering and agreeing on the blocks.
    """

    def __init__(
        self,
        address: RdmaAddress,
        ram: GuestRam,
        cancel: Cancel,
        options: EndpointOptions,
        limits: TransportLimits,
        *,
        pin_all: bool,
        assume_zero: bool = False,
        return_path: bool = False,
        stream_message: int = STREAM_MESSAGE,
        connections: int = 1,
    ) -> None:
        self.stream_message = stream_message
        self._cancel = cancel
        self._limits = limits
        self.setup_seconds = 0.0
        self._thread = threading.get_ident()
        self._file: QEMUFile | None = None  # where runs are accounted: the phase's
        self._in_setup = False
        self._exchanged = False
        self._phases = 0
        features = FEATURE_FINAL_ACK | FEATURE_FRESH_BLOCKS
        extension = Extension(features, secrets.randbits(64), connections - 1)
        asked = PrivateData(1, FLAG_PIN_ALL if pin_all else 0, extension)
        self._return_path: ReturnPathReader | None = None
        # While nobody waits for it yet; a chunk is registered as a whole.
        ram.map_data(lambda: cancel.requested)
        self._endpoint = connect(address.host, address.port, asked.encode(), cancel, options)
        try:
            if return_path:
                # Before any byte of the stream: a QEMU 7.2 crashes when it learns from that of a
                # return path that is not there yet.
                self._return_path = self._open_return_path(address, asked, options)
            granted = PrivateData.decode(self._endpoint.private_data)
            self.pin_all = pin_all and granted.pin_all
            beside = open_side_connections(self._endpoint, address.port, asked, cancel, options)
            self._side = SideConnections(beside, limits)
            features = granted.extension.features if granted.extension else 0
            self.final_ack = bool(features & FEATURE_FINAL_ACK)
            self.control = ControlChannel(self._endpoint, limits)
            self._trace = self._endpoint.trace
            self._writer = RamWriter(
                self._endpoint,
                self.control,
                ram,
                cancel,
                limits,
                pin_all=self.pin_all,
                hears_fresh=bool(features & FEATURE_FRESH_BLOCKS),
                assume_zero=assume_zero,
                account=self._account,
                beside=beside,
            )
        except BaseException:
            self.close()
            raise

    def _open_return_path(
        self, address: RdmaAddress, asked: PrivateData, options: EndpointOptions
    ) -> ReturnPathReader:
        options = replace(
            options, connect_seconds=min(options.connect_seconds, _RETURN_PATH_SECONDS)
        )
        try:
            # To the very address that took the first one: a name may lead elsewhere by now.
            host, port = self._endpoint.peer_host, address.port
            endpoint = connect(host, port, asked.encode(), self._cancel, options)
        except (PeerGone, MigrationTimeout) as error:
            raise PeerGone(
                f"{self._endpoint.peer} took no second connection, for the return path "
                f"({error.message})",
                remedy="switch return-path on at the destination too (QEMU up to 7.2: "
                "postcopy-ram), or leave --return-path out",
            ) from error
        endpoint.follow(self._endpoint)
        try:
            return ReturnPathReader(endpoint, self._limits, RETURN_PATH_PING)
        except BaseException:
            endpoint.close()
            raise

    @property
    def has_return_path(self) -> bool:
        """Whether the destination says on a return path how it ended."""
        return self._return_path is not None

    @property
    def restores(self) -> bool:
        """Whether the destination is a QEMU, and not one of ours, which keeps a snapshot."""
        return not self.final_ack

    @property
    def lists_shared(self) -> bool:
        """Whether the destination takes blocks in the list that it is not sent.

        A QEMU looks in vain for a shared block among those that it offers to RDMA
        (docs/protocol.md, x-ignore-shared), and misses none that is not listed.
        """
        return self.final_ack

    @property
    def peer(self) -> str:
        """HOST:PORT of the destination."""
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
        """Over how many RAM is written."""
        return 1 + len(self._side.endpoints)

    @property
    def bytes_written(self) -> int:
        """Bytes posted as RDMA writes so far."""
        return int(self._writer.queue.bytes)

    @property
    def zero_bytes(self) -> int:
        """Bytes of zeros that were not written: announced, or the destination has them."""
        return self._writer.zero_bytes

    @property
    def writes(self) -> int:
        """RDMA writes posted so far."""
        return int(self._writer.queue.writes)

    def _note_phase(self, state: str) -> None:
        if self._trace is not None:
            self._trace.record("phase", number=self._phases, state=state)

    def _own_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise LocalProtocolError("the hooks are called from the thread that connected")

    # ---- ByteChannel ----

    def write(self, data: bytes) -> None:
        """Send stream bytes; a pending run of pages goes before them."""
        self._own_thread()
        self._writer.queue.flush()
        for at in range(0, len(data), self.stream_message):
            piece = data[at : at + self.stream_message]
            self.control.send(ControlMessage(ControlType.QEMU_FILE, piece, repeat=0))

    def read(self) -> bytes:
        """A source's stream runs one way."""
        raise LocalProtocolError("a source does not read its stream")

    # ---- RamControlHooks ----

    def before_iterate(self, file: QEMUFile, flags: int) -> None:
        """Put the HOOK word as the last of its message, and take pages (not in SETUP)."""
        self._own_thread()
        if flags != _SETUP and not self._exchanged:
            raise LocalProtocolError("a RAM phase before the one of setup")
        if flags == _SETUP and (self._exchanged or self._in_setup):
            raise LocalProtocolError("a second setup phase")
        if self._writer.queue.is_open:
            raise LocalProtocolError("a RAM phase within a RAM phase")
        self._file = file
        file.put(encode_hook())
        file.flush()
        self._note_phase("begin")
        if flags == _SETUP:
            self._in_setup = True
        else:
            self._writer.queue.open()
            file.page_taker = self._writer.queue

    def after_iterate(self, file: QEMUFile, flags: int) -> None:
        """Write what is pending, wait until all writes have completed, end the phase."""
        self._own_thread()
        file.flush()
        if flags == _SETUP:
            if not self._in_setup:
                raise LocalProtocolError("the end of a setup phase that did not begin")
            self.setup_seconds = self._writer.exchange_blocks()
            self._exchanged = True
            self._in_setup = False
        else:
            if not self._writer.queue.is_open:
                raise LocalProtocolError("the end of a RAM phase that did not begin")
            self._writer.queue.flush()
            self._writer.wait_writes()
            file.page_taker = None
            self._writer.queue.close()
        self._side.end_phase()
        self.control.send(ControlMessage(ControlType.REGISTER_FINISHED))
        self._note_phase("end")
        self._phases += 1

    def load_hook(self, file: QEMUFile, flags: int, data: object) -> None:
        """Only a destination loads."""
        raise LocalProtocolError("a source does not load")

    def save_page(self, block_offset: int, offset: int, size: int) -> None:
        """Extend the pending run by a page, or write it and begin a new one."""
        self._writer.queue.offer(block_offset, offset, size)

    def save_pages(self, block_offset: int, dirty: DirtyBitmap | None) -> int:
        """Write all dirty pages of a block, or the whole block, in as few writes as can be."""
        self._own_thread()
        return self._writer.save_pages(block_offset, dirty)

    def _account(self, size: int, zero: bool) -> None:
        if self._file is not None:
            self._file.account(size, zero=zero)

    # ---- the end ----

    def wait_ready(self, doing: str) -> Callable[[bytes], None]:
        """Wait until the destination asks for more, and return what sends it.

        It asks when it has parsed all that it has, so this shows how far it came.
        """
        self.control.wait_ready(doing)

        def send(data: bytes) -> None:
            self.control.post(ControlMessage(ControlType.QEMU_FILE, data, repeat=0))

        return send

    def send_device_state(
        self,
        file: QEMUFile,
        raw: bytes,
        eof_offset: int,
        before_eof: Callable[[], None] | None = None,
    ) -> str:
        """Send it so that its borders show how far the destination came.

        A QEMU asks for more only when it has parsed what it has. So one message ends before the
        EOF byte, and the READY for that byte shows that every device was loaded; the READY for
        the description shows that the destination has left the device state for good
        (docs/protocol.md, end of stream).
        """
        file.put(raw[: eof_offset - 1])
        file.flush()
        send = self.wait_ready("its loading all device state")
        if before_eof is not None:
            before_eof()
        send(raw[eof_offset - 1 : eof_offset])
        confirmed = "the destination loaded all device state and asked for the end mark"
        piece = self.stream_message  # a description is asked for again after each
        for at in range(eof_offset, len(raw), piece):
            self.wait_ready("its leaving the device state")(raw[at : at + piece])
            confirmed = "the destination loaded all device state and asked for what follows"
        return confirmed

    def send_stream_end(self) -> None:
        """Say that nothing follows: without a description the destination could not know.

        Only where ``final_ack`` is agreed on; a QEMU knows the end by itself.
        """
        self.control.send(ControlMessage(ControlType.STREAM_END))

    def wait_final_ack(self) -> FinalAck:
        """Wait for the destination's word that RAM and device state are whole and on disk."""
        message = self.control.await_message(
            ControlType.FINAL_ACK, "the destination's final acknowledgement"
        )
        return FinalAck.decode(message.payload)

    def wait_shut(self) -> int:
        """Wait for the destination's last word on the return path.

        Returns:
            0 when it has loaded everything; else it has failed.
        """
        if self._return_path is None:
            raise LocalProtocolError("there is no return path")
        return self._return_path.wait_shut()

    def finish(self) -> str:
        """End the connection; a QEMU, which acknowledges nothing, is given time to do it first."""
        if not self.final_ack:
            self._endpoint.wait_disconnected(_DISCONNECT_SECONDS)
        self.close()
        return ""

    def abort(self) -> None:
        """Tell the destination that this end has failed, and end the connection."""
        self.control.send_error()
        self.close()

    def close(self) -> None:
        """End the connections and give back every registration. Idempotent."""
        if self._return_path is not None:
            self._return_path.close()
        self._endpoint.close()
