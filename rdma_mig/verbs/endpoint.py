# SPDX-License-Identifier: Apache-2.0
"""One RDMA connection: its queue pair, its control buffers, its waits, and their end.

The queue pair is one of our own and not rdma_cm's, for two reasons: it lives in a protection
domain of its own, so that nothing else in the process shares its keys; and we move it to RTS
ourselves, with a receiver-not-ready retry that waits for a peer which posts its receives late
(QEMU asks for none, docs/protocol.md, Handshake).
"""

from __future__ import annotations

import contextlib
import mmap
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rdma_mig import _pages
from rdma_mig.closing import Closing
from rdma_mig.errors import (
    HostError,
    LocalProtocolError,
    MigrationCancelled,
    MigrationTimeout,
    PeerGone,
)
from rdma_mig.verbs import addresses
from rdma_mig.verbs.host import explain_registration, port_state
from rdma_mig.verbs.loading import load
from rdma_mig.verbs.route import is_iwarp
from rdma_mig.waits import Cancel, Deadline

if TYPE_CHECKING:
    from rdma_mig import _verbs
    from rdma_mig.tracing import Observer
    from rdma_mig.verbs.events import EventChannel

__all__ = ["RNR_RETRY_FOREVER", "Endpoint", "EndpointOptions", "Holder"]

# Receiver-not-ready retries: InfiniBand takes 7 for "as long as it takes".
RNR_RETRY_FOREVER = 7

# ibv_wc_status values that say something about the peer (InfiniBand specification, 11.6.2).
_STATUS_RETRY_EXCEEDED = 12
_STATUS_RNR_RETRY_EXCEEDED = 13
_STATUS_REMOTE_ACCESS = 10
_STATUS_FLUSHED = 5

# How long the event may take that goes with flushed requests.
_EVENT_SECONDS = 0.5


class Holder(Protocol):
    """What keeps registered memory from being freed."""

    def release(self) -> None:
        """The memory is no longer registered."""
        ...


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """Sizes and limits of a connection.

    Attributes:
        slots: receive buffers posted.
        slot_size: bytes of one; the largest message that can arrive.
        depth: entries of the send queue.
        connect_seconds: limit on resolving, connecting and accepting, together.
        probe_seconds: silence after which a liveness probe is sent.
        silence_seconds: how long a probe may go unanswered.
        device, gid_index: which device of this host, and which of its GIDs; None for any.
        trace: told what happens on the connection; None for no trace.
    """

    slots: int = 4
    slot_size: int = 524288
    depth: int = 512
    connect_seconds: float = 10.0
    probe_seconds: float = 3.0
    silence_seconds: float = 11.0
    device: str | None = None
    gid_index: int | None = None
    trace: Observer | None = None


class Endpoint(Closing):
    """A connection that a Listener or connect() set up. Used from one thread; close() releases all.

    Attributes:
        peer: HOST:PORT of the other end, for messages.
        local: HOST:PORT of this end.
        device: name of the verbs device.
        iwarp: it is one of iWARP: the provider moves the queue pair, and speaks over TCP.
        path: GID index and path MTU (bytes) once the peer's parameters have arrived; None on iWARP.
        private_data: what the other end sent with its request or reply; padded by the transport.
        queue: posts and waits without the GIL.
    """

    def __init__(
        self,
        cmid: Any,
        events: EventChannel,
        cancel: Cancel,
        options: EndpointOptions,
        leader: Endpoint | None = None,
    ) -> None:
        """Take over a CMID that is bound to a device; build its queue pair, receives posted.

        With a ``leader`` the keys of what is registered there serve this connection as well, and
        closing the leader closes this one first.

        Raises:
            HostError: the connection is over another device than its leader.
        """
        from pyverbs.cq import CQ, CompChannel
        from pyverbs.device import Context
        from pyverbs.pd import PD
        from pyverbs.pyverbs_error import PyverbsError
        from pyverbs.qp import QP, QPCap, QPInitAttr

        verbs = load()
        self._verbs = verbs
        self.cmid = cmid
        self.events = events
        self.cancel = cancel
        self.options = options
        self.disconnected = False
        self.private_data = b""
        self.peer = addresses.describe(verbs.peer_address(cmid))
        self.local = addresses.describe(verbs.local_address(cmid))
        self.path: tuple[int | None, int | None] = (None, None)
        self._connected = False
        self._owns_events = False
        self._device_removed = False
        self._followers: list[Endpoint] = []
        self._sharing: list[Endpoint] = []
        self._regions: list[_verbs.MemoryRegion] = []
        self.trace = options.trace
        # What the regions are of, for the trace: block, first chunk, bytes.
        self._traced: dict[_verbs.MemoryRegion, tuple[str, int | None, int]] = {}
        self._closing = contextlib.ExitStack()
        self._closed = False
        self._closing.callback(cmid.close)
        self.device = "?"
        entries = options.depth + options.slots + 1
        try:
            # One Context a CMID, no second: each of them believes that it owns the device.
            if cmid.context is None:
                Context(cmid=cmid)
            context = cmid.context
            self.device = verbs.device_name(cmid)
            self.iwarp = is_iwarp(self.device)
            self._port: int = verbs.port_number(cmid)
            self.max_message = verbs.max_message_size(context, self._port)
            if leader is None:
                self._pd = PD(context)
                self._closing.callback(self._pd.close)
            else:
                self._share(leader)
            channel = CompChannel(context)
            self._closing.callback(channel.close)
            cq = CQ(context, entries, None, channel, 0)
            self._closing.callback(cq.close)
            self._cq = cq
            cap = QPCap(
                max_send_wr=options.depth,
                max_recv_wr=options.slots,
                max_send_sge=1,
                max_recv_sge=1,
                max_inline_data=0,
            )
            self._qp = QP(self._pd, QPInitAttr(qp_type=2, scq=cq, rcq=cq, cap=cap, sq_sig_all=0))
            self._closing.callback(self._qp.close)
            self.qp_number: int = self._qp.qp_num
            verbs.move_queue_pair(cmid, self._qp, verbs.QPS_INIT)
            buffers = mmap.mmap(-1, (options.slots + 1) * options.slot_size)
            self._closing.callback(buffers.close)
            region = self._register_buffers(buffers)
            self.queue: _verbs.WorkQueue = verbs.WorkQueue(
                self._qp,
                cq,
                cm_fd=events.fd,
                cancel_fd=cancel.fileno(),
                region=region,
                slots=options.slots,
                slot_size=options.slot_size,
                depth=options.depth,
                probe_ms=int(options.probe_seconds * 1000),
                silence_ms=int(options.silence_seconds * 1000),
                iwarp=self.iwarp,
            )
            for slot in range(options.slots):
                self.queue.post_receive(slot)
        except PyverbsError as error:
            self.close()
            raise explain_registration(
                OSError(getattr(error, "error_code", 0), str(error)),
                entries * 128,
                f"queues of {self.device}",
            ) from error
        except BaseException:
            self.close()
            raise

    def _share(self, leader: Endpoint) -> None:
        """Use the leader's protection domain: a key is good for the queue pairs of one."""
        if self.device != leader.device:
            raise HostError(
                f"the connection with {self.peer} runs over {self.device}, and the first one with "
                f"that host over {leader.device}",
                remedy="name an address of one device, or use one connection",
            )
        self._pd = leader._pd
        leader._sharing.append(self)

    def _register_buffers(self, buffers: mmap.mmap) -> _verbs.MemoryRegion:
        try:
            region: _verbs.MemoryRegion = self._verbs.MemoryRegion(
                self._pd, _pages.address_of(buffers), len(buffers), local_write=True
            )
        except OSError as error:
            raise explain_registration(error, len(buffers), "control buffers") from error
        self._closing.callback(region.close)
        return region

    # ---- connection ----

    def ready_to_receive(self) -> None:
        """Move the queue pair to RTR and RTS; the peer's parameters must have arrived."""
        if self.iwarp:
            return  # done by the provider, within connect and accept
        self.path = self._verbs.path_attributes(self.cmid)
        # INIT once more: before the connection is under way, the connection manager knows no
        # access flags, and a queue pair without them answers a liveness probe with an error.
        self._verbs.move_queue_pair(self.cmid, self._qp, self._verbs.QPS_INIT)
        self._verbs.move_queue_pair(self.cmid, self._qp, self._verbs.QPS_RTR)
        self._verbs.move_queue_pair(self.cmid, self._qp, self._verbs.QPS_RTS, RNR_RETRY_FOREVER)

    def established(self) -> None:
        """Both ends have agreed: from now on close() disconnects first."""
        self._connected = True

    @property
    def read_depth(self) -> int:
        """RDMA reads that may be under way at one time, either way.

        None but on iWARP, where a liveness probe is one: nothing else there comes back from a peer.
        """
        return 1 if self.iwarp else 0

    @property
    def peer_host(self) -> str:
        """Numeric address of the other end, as connect() takes it."""
        found = addresses.host_of(self._verbs.peer_address(self.cmid))
        return found[1] if found else ""

    @property
    def is_connected(self) -> bool:
        """Whether the connection is established, as far as this end knows."""
        return self._connected

    def owns_events(self) -> None:
        """Close the event channel with the connection: nobody else uses it."""
        self._owns_events = True

    def note_disconnected(self, *, device_removed: bool = False) -> None:
        """The peer has ended the connection, or this end's device is gone."""
        self.disconnected = True
        self._device_removed = device_removed
        for follower in self._followers:
            follower.note_disconnected(device_removed=device_removed)

    def follow(self, leader: Endpoint) -> None:
        """Count as disconnected when ``leader`` does: this one means nothing without it."""
        leader._followers.append(self)
        if leader.disconnected:
            self.note_disconnected()

    # ---- memory ----

    def register(
        self,
        address: int,
        length: int,
        *,
        what: str,
        remote_write: bool,
        holder: Holder | None,
        chunk: int | None = None,
    ) -> _verbs.MemoryRegion:
        """Pin and register ``length`` bytes at ``address``; the endpoint closes it at the latest.

        ``chunk`` is the first chunk of the block, for the trace; None for all of it.

        Raises:
            HostError: the memory cannot be pinned; ``what`` names it in the message. The holder has
                been released then.
        """
        began = time.monotonic() if self.trace is not None else 0.0
        try:
            region: _verbs.MemoryRegion = self._verbs.MemoryRegion(
                self._pd, address, length, remote_write=remote_write, holder=holder
            )
        except BaseException as error:
            if holder is not None:
                holder.release()
            if isinstance(error, OSError):
                raise explain_registration(error, length, what) from error
            raise
        self._regions.append(region)
        if self.trace is not None:
            self._traced[region] = (what, chunk, length)
            now = time.monotonic()
            seconds = round(now - began, 6)
            self.trace.record(
                "register", now=now, block=what, chunk=chunk, bytes=length, seconds=seconds
            )
        return region

    def deregister(self, region: _verbs.MemoryRegion) -> None:
        """Withdraw one key given out by register()."""
        self._regions.remove(region)
        self._close_region(region)

    def deregister_all(self) -> None:
        """Withdraw every key given out by register(): nobody else can change that memory now."""
        while self._regions:
            self._close_region(self._regions.pop())

    def _close_region(self, region: _verbs.MemoryRegion) -> None:
        region.close()
        if self.trace is not None:
            what, chunk, length = self._traced.pop(region)
            self.trace.record("deregister", block=what, chunk=chunk, bytes=length)

    # ---- waiting ----

    def wait(self, what: int, doing: str, deadline: Deadline) -> None:
        """Wait for the queue.

        Args:
            what: one of the Cython layer's WAIT_* constants.
            doing: what is awaited, for messages ("READY from the destination").
            deadline: limit of this wait.

        Raises:
            PeerGone, MigrationTimeout, MigrationCancelled: why it did not come.
            HostError: the device is gone.
            LocalProtocolError: close() was called before.
        """
        self._require_open()
        while True:
            # Its end is told once. What arrived before it still counts: a look, without waiting.
            ended = self.disconnected
            outcome = self.queue.wait(what, 1 if ended else deadline.ns)
            if outcome == self._verbs.DONE:
                return
            if outcome == self._verbs.CM_EVENT and not ended:
                self.events.dispatch()
                continue
            self._raise(outcome, doing, deadline)

    def interrupted(self, outcome: int, doing: str, deadline: Deadline) -> None:
        """Deal with a wait that a write met in the Cython layer; return when it can go on."""
        self._require_open()
        if outcome == self._verbs.CM_EVENT:
            self.events.dispatch()
            if not self.disconnected:
                return
        self._raise(outcome, doing, deadline)

    def _require_open(self) -> None:
        if self._closed:
            raise LocalProtocolError(f"the connection to {self.peer} was closed by this end")

    def _raise(self, outcome: int, doing: str, deadline: Deadline) -> None:
        verbs = self._verbs
        failed = self.queue.failure
        if self.iwarp and failed is not None and failed[1] == _STATUS_FLUSHED:
            # Requests are flushed there before the event comes that says why.
            self.wait_disconnected(_EVENT_SECONDS)
        if self._device_removed:
            raise HostError(
                f"the RDMA device {self.device} was removed; awaited was {doing}",
                remedy="rdma link show",
            )
        if self.disconnected:
            raise PeerGone(f"{self.peer} closed the connection; awaited was {doing}")
        if outcome == verbs.CANCELLED:
            raise MigrationCancelled(f"cancelled while waiting for {doing} ({self.peer})")
        if outcome == verbs.TIMED_OUT:
            raise MigrationTimeout(
                f"nothing came from {self.peer} within {deadline.seconds:g} s; awaited was {doing}",
                remedy="see what the other end does, or allow more with --timeout or "
                "--stall-timeout, whichever was given",
            )
        if port_state(self.device, self._port) == "DOWN":
            raise HostError(
                f"the link of this host's RDMA device {self.device} is down (port {self._port}), "
                f"and with it the connection with {self.peer}; awaited was {doing}",
                remedy="mend the link (ip link show; rdma link show) and migrate again",
            )
        if outcome == verbs.SILENT:
            raise PeerGone(
                f"the host of {self.peer} has not answered for "
                f"{self.options.silence_seconds:.0f} s; awaited was {doing}",
                remedy="check the network between the hosts",
            )
        failure = self.queue.failure
        assert failure is not None
        kind, status, words, _vendor = failure
        remedy = ""
        if status == _STATUS_RETRY_EXCEEDED:
            words += ": its host or process is gone"
        elif status == _STATUS_RNR_RETRY_EXCEEDED:
            words += ": it has no receive posted"
        elif status == _STATUS_REMOTE_ACCESS:
            remedy = "the other end withdrew its memory: see its messages"
        raise PeerGone(
            f"{kind} to {self.peer} failed: {words} (status {status}); awaited was {doing}",
            remedy=remedy,
        )

    # ---- the end ----

    def disconnect(self) -> None:
        """Tell the peer that the connection ends. Idempotent, best effort."""
        if not self._connected:
            return
        self._connected = False
        # Both sides must call it, or the active side never sees the end; it fails only where
        # the connection is over already.
        with contextlib.suppress(Exception):
            self.cmid.disconnect()

    def wait_disconnected(self, seconds: float) -> bool:
        """Give the peer time to disconnect; return whether it did. Cancellation ends it early."""
        deadline = Deadline.after(seconds)
        while not self.disconnected and not deadline.passed and not self.cancel.requested:
            self.events.wait(deadline, self.cancel)
            self.events.dispatch()
        return self.disconnected

    def close(self) -> None:
        """Disconnect, stop the queue pair, then give back memory and objects. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for other in self._sharing:
            other.close()
        self.disconnect()
        self.events.forget(self)
        if hasattr(self, "_qp"):
            # From here on the device touches neither our memory nor the peer's.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._verbs.fail_queue_pair(self._qp)
        self.deregister_all()
        self._closing.close()
        if self._owns_events:
            self.events.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed Endpoint to {self.peer}", ResourceWarning, stacklevel=2)
            self.close()
