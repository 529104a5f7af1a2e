# SPDX-License-Identifier: Apache-2.0
"""The connection manager: listening, accepting, connecting, and the events of a connection."""

from __future__ import annotations

import contextlib
import errno
import select
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rdma_mig.closing import Closing
from rdma_mig.errors import HostError, MigrationError, MigrationTimeout, PeerGone
from rdma_mig.verbs import addresses
from rdma_mig.verbs.endpoint import Endpoint, EndpointOptions
from rdma_mig.verbs.host import devices, require_rdma, unusable_devices
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, Deadline

__all__ = ["EventChannel", "Listener", "connect"]

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

# Reject reason "invalid service id": nobody listens there (IB specification, table 108).
_REJECT_NO_LISTENER = 8

# How often a request is sent again before the peer's host counts as gone: as often as QEMU does it.
# rxe waits 2.15 s each time, which makes 13 s; with 6 it would be longer than the 15 s that a peer
# may be silent, and 7 means "for ever" to it.
_RETRY = 5
_RNR_RETRY_FOREVER = 7


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
    """An rdma_cm event channel; it hands events to whom they concern. Closed by its owner."""

    def __init__(self) -> None:
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
        self._listener: Any = None
        self._queue: list[Event] = []

    def watch(self, endpoint: Endpoint) -> None:
        """Tell an endpoint when its connection ends, and turn away everybody else."""
        self._endpoints[self._verbs.identifier(endpoint.cmid)] = endpoint
        queued, self._queue = self._queue, []
        for event in queued:
            self._deliver(event)

    def forget(self, endpoint: Endpoint) -> None:
        """The endpoint is being closed."""
        for identifier, known in list(self._endpoints.items()):
            if known is endpoint:
                del self._endpoints[identifier]

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
            return Event(kind, status, identifier, private_data, request)
        finally:
            raw.ack_cm_event()

    def dispatch(self) -> None:
        """Handle all events that are due, without waiting."""
        while (event := self._read()) is not None:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        if event.type in (DISCONNECTED, DEVICE_REMOVAL):
            endpoint = self._endpoints.get(event.identifier)
            if endpoint is not None:
                endpoint.note_disconnected(device_removed=event.type == DEVICE_REMOVAL)
                return
        if event.type == CONNECT_REQUEST and self._endpoints:
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
            about: a CMID: other clients' events are passed over, and requests turned away.

        Raises:
            MigrationTimeout, MigrationCancelled: none came.
        """
        wanted = None if about is None else self._verbs.identifier(about)
        while True:
            event = self._next(doing, peer, deadline, cancel)
            if wanted in (None, event.identifier):
                return event
            if event.request is not None:
                self.turn_away(event.request)

    def _next(self, doing: str, peer: str, deadline: Deadline, cancel: Cancel) -> Event:
        while not self._queue:
            cancel.check(doing)
            self.dispatch()
            if self._queue:
                break
            if deadline.passed:
                raise MigrationTimeout(
                    f"no answer within {deadline.seconds:.0f} s while {doing} ({peer})",
                    remedy="check that the other host is up and its RDMA device is active "
                    "(ibv_devinfo, rping)",
                )
            self.wait(deadline, cancel)
        return self._queue.pop(0)

    def close(self) -> None:
        """Give the channel back; every CMID on it must be closed. Idempotent."""
        for event in self._queue:
            if event.request is not None:
                self.turn_away(event.request)
        self._queue.clear()
        self.raw.close()


def _event_error(event: Event, doing: str, peer: str) -> MigrationError:
    """Say what an event other than the awaited one means."""
    name = load().event_name(event.type)
    if event.type == REJECTED:
        if event.status == _REJECT_NO_LISTENER:
            return PeerGone(
                f"nobody listens at {peer}",
                remedy="start the destination first, and check host and port",
            )
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


class Listener(Closing):
    """A listening address; accept() takes the first client.

    Args:
        host, port: where; 0.0.0.0 or :: for every address, port 0 for a free one.
        cancel: ends every wait.
        options: for the connections.

    Attributes:
        address: (host, port) as bound.

    Raises:
        HostError: no device, no such address, port taken.
    """

    def __init__(self, host: str, port: int, cancel: Cancel, options: EndpointOptions) -> None:
        from pyverbs.cmid import CMID

        self.cancel = cancel
        self.options = options
        self._verbs = load()
        self.events = EventChannel()
        self._closed = False
        self._accepted = False
        self._cmid: Any = None
        try:
            deadline = Deadline.after(options.connect_seconds)
            candidates = addresses.resolve(host, port, cancel, deadline)
            failure: HostError | None = None
            for candidate in candidates:
                try:
                    self._cmid = CMID(creator=self.events.raw)
                    self._verbs.bind_address(self._cmid, addresses.pack(candidate))
                    self._cmid.listen(5)
                except (OSError, self.events._error) as error:
                    failure = _bind_error(error, host, port)
                    self.stop()
                    continue
                break
            else:
                raise failure or HostError(f"{host} has no address to listen at")
            self.events.listen_on(self._cmid)
            bound = addresses.unpack(self._verbs.local_address(self._cmid))
            assert bound is not None
            self.address: tuple[str, int] = (bound[1], bound[2])
        except BaseException:
            self.close()
            raise

    def accept(self, answer: Callable[[bytes, str], bytes], deadline: Deadline) -> Endpoint:
        """Wait for a client and accept it.

        Args:
            answer: given the private data of the request and the client's address, returns the
                private data of the reply; a MigrationError it raises rejects the client, its text
                being the reason.
            deadline: limit of the wait for a client; the handshake has its own.

        Returns:
            the connection; the listener still has to be closed, and takes nobody else.
        """
        doing = "waiting for a source to connect"
        while True:
            event = self.events.next(doing, "any peer", deadline, self.cancel)
            if event.type == DEVICE_REMOVAL:
                raise HostError(
                    f"the RDMA device of {self.address[0]} was removed while {doing}",
                    remedy="rdma link show",
                )
            if event.type != CONNECT_REQUEST:
                continue  # left over from a client that went away while it connected
            endpoint = self._serve(event, answer)
            if endpoint is not None:
                return endpoint

    def _serve(self, event: Event, answer: Callable[[bytes, str], bytes]) -> Endpoint | None:
        """Accept one client; None when it has gone meanwhile, and the next one may be taken."""
        from pyverbs.cmid import ConnParam

        request = event.request
        peer = addresses.describe(self._verbs.peer_address(request))
        try:
            reply = answer(event.private_data, peer)
        except MigrationError as error:
            self.events.turn_away(request, str(error).encode("ascii", "replace")[:147])
            raise
        try:
            endpoint = Endpoint(request, self.events, self.cancel, self.options)
        except OSError:
            return None
        try:
            endpoint.private_data = event.private_data
            endpoint.ready_to_receive()
            parameters = ConnParam(
                resources=0,
                depth=0,
                rnr_retry=_RNR_RETRY_FOREVER,
                qp_num=endpoint.qp_number,
                data_len=len(reply),
            )
            parameters.set_private_data(reply)
            request.accept(parameters)
            limit = Deadline.after(self.options.connect_seconds)
            event = self.events.next("accepting", peer, limit, self.cancel, about=request)
            if event.type == ESTABLISHED:
                endpoint.established()
                self.events.watch(endpoint)
                return endpoint
            endpoint.close()
            return None
        except (OSError, self.events._error):
            # The calls between its request and our acceptance fail only where it has gone.
            endpoint.close()
            return None
        except BaseException:
            endpoint.close()
            raise

    def stop(self) -> None:
        """Listen no longer; connections made already, and their events, live on."""
        cmid, self._cmid = self._cmid, None
        if cmid is not None:
            cmid.close()

    def close(self) -> None:
        """Close the listener and its event channel, after the endpoints. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        self.events.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn("unclosed Listener", ResourceWarning, stacklevel=2)
            self.close()


def _bind_error(error: Exception, host: str, port: int) -> HostError:
    code = error.errno if isinstance(error, OSError) else getattr(error, "error_code", None)
    where = f"{host}:{port}"
    if code == errno.EADDRINUSE:
        return HostError(
            f"port {port} at {host} is taken",
            remedy="choose another port, or 0 for a free one; rdma resource show cm_id tells "
            "who has it",
        )
    if code in (errno.ENODEV, errno.EADDRNOTAVAIL):
        # librdmacm does not see a device that it may not open.
        if code == errno.ENODEV and (unusable := unusable_devices()):
            return unusable[0]
        return HostError(
            f"{host} is not the address of an RDMA device on this host "
            f"(devices: {', '.join(devices())})",
            remedy="listen at an address of an interface that rdma link show names, or at 0.0.0.0",
        )
    if code == errno.EACCES:
        return HostError(f"no permission to listen at {where}", remedy="use a port above 1023")
    return HostError(f"cannot listen at {where}: {error}", remedy="rdma link show; ip address show")


def connect(
    host: str, port: int, private_data: bytes, cancel: Cancel, options: EndpointOptions
) -> Endpoint:
    """Connect to a destination; receives are posted before it learns of us.

    Args:
        host, port: where it listens.
        private_data: sent with the request, at most 56 bytes.
        cancel: ends every wait.
        options: sizes and limits.

    Returns:
        the connection; its private_data is the destination's. It owns its event channel.

    Raises:
        HostError: this host cannot reach it over RDMA.
        PeerGone: nobody listens there, or it rejected us.
        MigrationTimeout, MigrationCancelled: it took too long.
    """
    deadline = Deadline.after(options.connect_seconds)
    events = EventChannel()
    try:
        candidates = addresses.resolve(host, port, cancel, deadline)
        failure: MigrationError | None = None
        for candidate in candidates:
            try:
                return _connect_to(candidate, events, private_data, cancel, options, deadline)
            except (HostError, PeerGone) as error:
                failure = failure or error
        raise failure or HostError(f"{host} has no address")
    except BaseException:
        events.close()
        raise


def _connect_to(
    candidate: addresses.SockAddr,
    events: EventChannel,
    private_data: bytes,
    cancel: Cancel,
    options: EndpointOptions,
    deadline: Deadline,
) -> Endpoint:
    from pyverbs.cmid import CMID, ConnParam

    verbs = load()
    packed = addresses.pack(candidate)
    peer = addresses.describe(packed)
    cmid = CMID(creator=events.raw)
    endpoint: Endpoint | None = None

    def expect(wanted: int, doing: str) -> Event:
        event = events.next(doing, peer, deadline, cancel, about=cmid)
        if event.type != wanted:
            raise _event_error(event, doing, peer)
        return event

    def milliseconds() -> int:
        return max(1, int((deadline.remaining or 0) * 1000))

    try:
        try:
            verbs.resolve_address(cmid, None, packed, milliseconds())
        except OSError as error:
            raise _event_error(
                Event(ADDR_ERROR, -(error.errno or 0), 0, b""), "resolving", peer
            ) from error
        expect(ADDR_RESOLVED, "resolving the address")
        cmid.resolve_route(milliseconds())
        expect(ROUTE_RESOLVED, "resolving the route")
        endpoint = Endpoint(cmid, events, cancel, options)
        parameters = ConnParam(
            resources=0,
            depth=0,
            retry=_RETRY,
            rnr_retry=_RNR_RETRY_FOREVER,
            qp_num=endpoint.qp_number,
            data_len=len(private_data),
        )
        parameters.set_private_data(private_data)
        cmid.connect(parameters)
        event = expect(CONNECT_RESPONSE, "connecting")
        endpoint.private_data = event.private_data
        endpoint.peer = peer
        try:
            endpoint.ready_to_receive()
            cmid.establish()
        except (OSError, events._error) as error:
            raise PeerGone(f"{peer} accepted the connection and ended it again") from error
        endpoint.established()
        events.watch(endpoint)
        endpoint.owns_events()
        return endpoint
    except (OSError, events._error) as error:
        raise HostError(f"connecting to {peer} failed: {error}") from error
    finally:
        if endpoint is None:
            cmid.close()
        elif not endpoint.is_connected:
            endpoint.close()
