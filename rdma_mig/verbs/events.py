# SPDX-License-Identifier: Apache-2.0
"""The events of rdma_cm: taken off their channel, handed to whom they concern, put in words."""

from __future__ import annotations

import contextlib
import errno
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdma_mig.errors import HostError, MigrationError, MigrationTimeout, PeerGone
from rdma_mig.verbs import addresses
from rdma_mig.verbs.endpoint import Endpoint
from rdma_mig.verbs.host import devices, require_rdma
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, Deadline

if TYPE_CHECKING:
    from rdma_mig.tracing import Observer

__all__ = ["Event", "EventChannel", "event_error", "no_answer", "nobody_listens"]

# enum rdma_cm_event_type (rdma_cma.h).
ADDR_RESOLVED = 0
ADDR_ERROR = 1
ROUTE_RESOLVED = 2
ROUTE_ERROR = 3
CONNECT_REQUEST = 4
CONNECT_RESPONSE = 5
CONNECT_ERROR = 6
UNREACHABLE = 7
REJECTED = 8
ESTABLISHED = 9
DISCONNECTED = 10
DEVICE_REMOVAL = 11
ADDR_CHANGE = 14

# What ends a connection that is up, or on its way there.
_ENDS = (CONNECT_ERROR, UNREACHABLE, REJECTED, DISCONNECTED, DEVICE_REMOVAL)

# Reject reason "invalid service id": nobody listens there (IB specification, table 108).
_REJECT_NO_LISTENER = 8


@dataclass(frozen=True, slots=True)
class Event:
    """One connection event, already acknowledged; ``request`` is the CMID of a new connection."""

    type: int
    status: int
    identifier: int
    private_data: bytes
    request: Any = None


def _no_channel(error: Any) -> HostError:
    """Say why librdmacm cannot be used, although the device files can be opened."""
    if getattr(error, "error_code", None) == errno.ENODEV:
        return HostError(
            f"libibverbs has no driver library for {', '.join(devices())}",
            remedy="apt-get install ibverbs-providers (or what the adapter's vendor ships)",
        )
    return HostError(f"rdma_cm cannot be used: {error}", remedy="modprobe rdma_ucm")


class EventChannel:
    """An rdma_cm event channel; it hands events to whom they concern. Closed by its owner.

    Args:
        trace: told of every event; None for no trace.
    """

    def __init__(self, trace: Observer | None = None) -> None:
        self._trace = trace
        require_rdma()
        self._verbs = load()
        from pyverbs.cmid import CMEventChannel
        from pyverbs.pyverbs_error import PyverbsError

        self._error = PyverbsError
        try:
            self.raw = CMEventChannel()
        except PyverbsError as error:
            raise _no_channel(error) from error
        self.fd: int = self._verbs.event_channel_fd(self.raw)
        self._endpoints: dict[int, Endpoint] = {}
        self._doorman: Callable[[Event], None] | None = None
        self._listener: Any = None
        self._queue: list[Event] = []

    def watch(self, endpoint: Endpoint) -> None:
        """Tell an endpoint when its connection ends, and turn away everybody else."""
        self._endpoints[self._verbs.identifier(endpoint.cmid)] = endpoint
        queued, self._queue = self._queue, []
        for event in queued:
            self._deliver(event)

    @property
    def watches_any(self) -> bool:
        """Whether a connection of this channel is up."""
        return bool(self._endpoints)

    def forget(self, endpoint: Endpoint) -> None:
        """The endpoint is being closed."""
        for identifier, known in list(self._endpoints.items()):
            if known is endpoint:
                del self._endpoints[identifier]

    def post_doorman(self, serve: Callable[[Event], None] | None) -> None:
        """Say who deals with connection requests while a connection is up or being accepted.

        It is called within dispatch() and must neither wait nor raise. None: everybody is turned
        away.
        """
        self._doorman = serve

    def listen_on(self, cmid: Any) -> None:
        """Connection requests to this CMID become events with a CMID of their own."""
        self._listener = cmid

    def _read(self) -> Event | None:
        """Take one event off the channel; None when there is none."""
        from pyverbs.cmid import CMID, CMEvent

        try:
            raw = CMEvent(self.raw)
        except self._error as error:
            if getattr(error, "error_code", None) in (errno.EAGAIN, errno.EINTR):
                return None
            raise HostError(f"rdma_cm events cannot be read: {error}") from error
        # Whatever happens, the event is acknowledged: rdma_destroy_id() waits for that.
        try:
            kind, status, identifier, _listening = self._verbs.event_details(raw)
            request = None
            private_data = b""
            if kind in (CONNECT_REQUEST, CONNECT_RESPONSE, ESTABLISHED, REJECTED):
                private_data = bytes(raw.private_data or b"")
            if kind == CONNECT_REQUEST:
                request = CMID(creator=raw, listen_id=self._listener)
            if self._trace is not None:
                self._record(kind, status, identifier, request)
            return Event(kind, status, identifier, private_data, request)
        finally:
            raw.ack_cm_event()

    def _record(self, kind: int, status: int, identifier: int, request: Any) -> None:
        peer = ""
        if request is not None:
            peer = addresses.describe(self._verbs.peer_address(request))
        elif (endpoint := self._endpoints.get(identifier)) is not None:
            peer = endpoint.peer
        assert self._trace is not None
        name = self._verbs.event_name(kind).removeprefix("RDMA_CM_EVENT_")
        self._trace.record("cm", event=name, status=status, peer=peer)

    def dispatch(self) -> None:
        """Handle all events that are due, without waiting."""
        while (event := self._read()) is not None:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        endpoint = self._endpoints.get(event.identifier)
        if endpoint is not None:
            if event.type == ESTABLISHED:
                endpoint.established()
            elif event.type in _ENDS:
                endpoint.note_disconnected(device_removed=event.type == DEVICE_REMOVAL)
            return
        if event.type == CONNECT_REQUEST and self._endpoints:
            if self._doorman is not None:
                self._doorman(event)
            else:
                # One migration, one peer: a further client is turned away at once.
                self.turn_away(event.request)
            return
        self._queue.append(event)

    def turn_away(self, request: Any, reason: bytes = b"") -> None:
        """Reject a connection request and let go of it."""
        with contextlib.suppress(OSError):
            self._verbs.reject(request, reason)
        with contextlib.suppress(self._error):
            request.close()

    def wait(self, deadline: Deadline, cancel: Cancel) -> None:
        """Wait until an event is due, the deadline has passed or cancellation was asked for."""
        remaining = deadline.remaining
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(cancel.fileno(), select.POLLIN)
        poll.poll(None if remaining is None else remaining * 1000)

    def next(
        self,
        doing: str,
        peer: str,
        deadline: Deadline,
        cancel: Cancel,
        about: Any = None,
    ) -> Event:
        """Return the next event that dispatch() does not handle by itself.

        Args:
            doing, peer: for messages.
            deadline, cancel: limit of the wait.
            about: a CMID: other clients' events are passed over, and requests turned away or, where
                there is a doorman, kept for him.

        Raises:
            MigrationTimeout, MigrationCancelled: none came.
        """
        wanted = None if about is None else self._verbs.identifier(about)
        requests: list[Event] = []
        try:
            while True:
                event = self._next(doing, peer, deadline, cancel)
                if wanted in (None, event.identifier):
                    return event
                if event.request is not None:
                    if self._doorman is None:
                        self.turn_away(event.request)
                    else:
                        requests.append(event)
        finally:
            self._queue[:0] = requests

    def _next(self, doing: str, peer: str, deadline: Deadline, cancel: Cancel) -> Event:
        while not self._queue:
            cancel.check(doing)
            self.dispatch()
            if self._queue:
                break
            if deadline.passed:
                raise no_answer(doing, peer, deadline)
            self.wait(deadline, cancel)
        return self._queue.pop(0)

    def close(self) -> None:
        """Give the channel back; every CMID on it must be closed. Idempotent."""
        for event in self._queue:
            if event.request is not None:
                self.turn_away(event.request)
        self._queue.clear()
        self.raw.close()


def no_answer(doing: str, peer: str, deadline: Deadline) -> MigrationTimeout:
    """The peer has let the limit pass."""
    return MigrationTimeout(
        f"no answer within {deadline.seconds:.0f} s while {doing} ({peer})",
        remedy="check that the other host is up and its RDMA device is active (ibv_devinfo, rping)",
    )


def nobody_listens(peer: str) -> PeerGone:
    """The peer's host answers, and its port does not."""
    return PeerGone(
        f"nobody listens at {peer}",
        remedy="start the destination first, and check host and port",
    )


def event_error(event: Event, doing: str, peer: str) -> MigrationError:
    """Say what an event other than the awaited one means."""
    name = load().event_name(event.type)
    if event.type == REJECTED:
        if event.status == _REJECT_NO_LISTENER:
            return nobody_listens(peer)
        reason = event.private_data.split(b"\0", 1)[0].decode("ascii", "replace")
        said = f": {reason}" if reason.isprintable() and reason else ""
        return PeerGone(f"{peer} rejected the connection (reason {event.status}){said}")
    status = f" ({errno.errorcode.get(-event.status, event.status)})" if event.status else ""
    if event.type in (ADDR_ERROR, ROUTE_ERROR):
        return HostError(
            f"no RDMA path to {peer}{status}",
            remedy="the address must be reached through an interface with an RDMA device: "
            "rdma link show; ip route get ADDRESS",
        )
    return PeerGone(f"{name}{status} while {doing} ({peer})")
