# SPDX-License-Identifier: Apache-2.0
"""Listening for a connection, and accepting it."""

from __future__ import annotations

import contextlib
import errno
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from rdma_mig.closing import Closing
from rdma_mig.errors import HostError, MigrationError, MigrationTimeout, RemoteProtocolError
from rdma_mig.verbs import addresses
from rdma_mig.verbs.choice import Choice
from rdma_mig.verbs.endpoint import RNR_RETRY_FOREVER, Endpoint, EndpointOptions
from rdma_mig.verbs.events import (
    CONNECT_REQUEST,
    DEVICE_REMOVAL,
    ESTABLISHED,
    Event,
    EventChannel,
)
from rdma_mig.verbs.host import devices, unusable_devices
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, Deadline, nobody_came
from rdma_mig.words import place

__all__ = ["Admission", "Admit", "Answer", "Listener"]

Answer = Callable[[bytes, str], bytes]
"""Private data and address of a client to the private data of the reply.

A RemoteProtocolError that it raises rejects the client, its text being the reason.
"""


class Admission(NamedTuple):
    """What becomes of a client beside the first.

    Attributes:
        reply: private data of the reply.
        number: its key in Listener.others, which nobody has yet.
        options: for its connection; None for those of the first.
        shares_memory: what is registered on the first connection can be reached over it.
        last: nobody else is expected.
    """

    reply: bytes
    number: int = 0
    options: EndpointOptions | None = None
    shares_memory: bool = False
    last: bool = True


Admit = Callable[[bytes, str], Admission]
"""Like an Answer, for those beside the first."""

# Bytes of a reject's private data that we use, its end a NUL (InfiniBand specification, 12.6.7).
_REASON_MAX = 147


class Listener(Closing):
    """A listening address; accept() takes the first client, and others where that is wanted.

    Args:
        host, port: where; 0.0.0.0 or :: for every address, port 0 for a free one.
        cancel: ends every wait.
        options: for the connections.
        guard: given the numeric host of a client, returns why it is not served, or an empty text;
            asked before anything is made for the client. None: everybody is served.
        refused: told of a client that was not served, and why; the guard tells of its own.

    Attributes:
        address: (host, port) as bound.
        others: the connections beside the first, by number; closed with the listener at the
            latest.
        device: name of the device that the address belongs to; empty where it is every address.

    Raises:
        HostError: no device, no such address, port taken.
    """

    def __init__(
        self,
        host: str,
        port: int,
        cancel: Cancel,
        options: EndpointOptions,
        guard: Callable[[str], str] | None = None,
        refused: Callable[[str, str], None] | None = None,
    ) -> None:
        from pyverbs.cmid import CMID

        self.cancel = cancel
        self.options = options
        self._verbs = load()
        self.events = EventChannel(options.trace)
        self._closed = False
        self.others: dict[int, Endpoint] = {}
        self._guard = guard
        self._refused = refused
        self._cmid: Any = None
        try:
            self._choice = Choice.of(options.device, options.gid_index)
            deadline = Deadline.after(options.connect_seconds)
            candidates = addresses.resolve(host, port, cancel, deadline)
            failure: HostError | None = None
            for candidate in candidates:
                try:
                    self._cmid = CMID(creator=self.events.raw)
                    self._verbs.bind_address(self._cmid, addresses.pack(candidate))
                    self._choice.check_listening(self._cmid, candidate[1])
                    self._cmid.listen(5)
                except HostError as error:
                    failure = error
                    self.stop()
                    continue
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
            self.device: str = self._verbs.device_name(self._cmid)
        except BaseException:
            self.close()
            raise

    def accept(self, answer: Answer, deadline: Deadline, others: Admit | None = None) -> Endpoint:
        """Wait for a client and accept it.

        What a client does wrong up to then is its own affair: whoever reaches this host may call
        here by mistake, or to do harm, while the source is still to come. So it is turned away, and
        the wait goes on.

        Args:
            answer: what the client is told.
            deadline: limit of the wait for a client; the handshake has its own.
            others: answers further requests, which then are among ``others``. It is asked only
                about clients from the address that the first one came from, and until the last one
                was accepted or stop() was called; nobody waits for that. None: the first client
                stays the only one.

        Returns:
            the connection; the listener still has to be closed, and takes nobody else.
        """
        doing = "waiting for a source to connect"
        while True:
            try:
                event = self.events.next(doing, "any peer", deadline, self.cancel)
            except MigrationTimeout:
                where = f"rdma:{place(*self.address)}"
                raise nobody_came("a source", where, deadline) from None
            if event.type == DEVICE_REMOVAL:
                raise HostError(
                    f"the RDMA device of {self.address[0]} was removed while {doing}",
                    remedy="rdma link show",
                )
            if event.type != CONNECT_REQUEST:
                continue  # left over from a client that went away while it connected
            try:
                endpoint = self._serve(event, answer, others)
            finally:
                if not self.events.watches_any:
                    self.events.post_doorman(None)
            if endpoint is not None:
                return endpoint

    def _serve(self, event: Event, answer: Answer, others: Admit | None) -> Endpoint | None:
        """Accept one client; None when it was not served or has gone, and the next may be taken."""
        request = event.request
        raw = self._verbs.peer_address(request)
        peer = addresses.describe(raw)
        if unwanted := self._why_not(request, raw):
            self.events.turn_away(request, unwanted.encode("ascii", "replace")[:_REASON_MAX])
            return None
        try:
            reply = answer(event.private_data, peer)
        except RemoteProtocolError as error:
            self._reject(request, error)
            self._tell(peer, str(error))
            return None
        endpoint = self._begin(event, reply)
        if endpoint is None:
            return None
        if others is not None:
            # From now on: a source may open its second connection before we learn that the first
            # one is established.
            self.events.post_doorman(lambda event: self._admit(event, endpoint, others))
        try:
            limit = Deadline.after(self.options.connect_seconds)
            event = self.events.next("accepting", peer, limit, self.cancel, about=request)
            if event.type == ESTABLISHED:
                endpoint.established()
                self.events.watch(endpoint)
                return endpoint
            endpoint.close()
            return None
        except MigrationTimeout:
            endpoint.close()
            self._tell(peer, f"it was accepted and did not confirm that within {limit.seconds:g} s")
            return None
        except self.events._error:
            endpoint.close()
            return None
        except BaseException:
            endpoint.close()
            raise

    def _tell(self, peer: str, reason: str) -> None:
        if self._refused is not None:
            self._refused(peer, reason)

    def _why_not(self, request: Any, raw: bytes) -> str:
        """Return why a client is not served; nothing when it is."""
        host = addresses.host_of(raw)
        if self._guard is not None and (reason := self._guard(host[1] if host else "")):
            return reason
        try:
            reason = self._choice.why_not(request)
        except OSError:
            return "gone meanwhile"
        if reason:
            self._tell(addresses.describe(raw), reason)
        return reason

    def _begin(
        self,
        event: Event,
        reply: bytes,
        options: EndpointOptions | None = None,
        leader: Endpoint | None = None,
    ) -> Endpoint | None:
        """Build a client's connection and send the reply; None when the client has gone."""
        from pyverbs.cmid import ConnParam

        request = event.request
        try:
            endpoint = Endpoint(request, self.events, self.cancel, options or self.options, leader)
        except OSError:
            return None
        try:
            endpoint.private_data = event.private_data
            endpoint.ready_to_receive()
            parameters = ConnParam(
                resources=endpoint.read_depth,
                depth=endpoint.read_depth,
                rnr_retry=RNR_RETRY_FOREVER,
                qp_num=endpoint.qp_number,
                data_len=len(reply),
            )
            parameters.set_private_data(reply)
            request.accept(parameters)
        except (OSError, self.events._error):
            # The calls between its request and our acceptance fail only where it has gone.
            endpoint.close()
            return None
        except BaseException:
            endpoint.close()
            raise
        return endpoint

    def _admit(self, event: Event, first: Endpoint, answer: Admit) -> None:
        """Deal with a request that comes beside the first connection; the doorman."""
        raw = self._verbs.peer_address(event.request)
        try:
            if addresses.host_of(raw) != addresses.host_of(self._verbs.peer_address(first.cmid)):
                raise RemoteProtocolError("a migration from another host is under way")
            admission = answer(event.private_data, addresses.describe(raw))
        except RemoteProtocolError as error:
            self._reject(event.request, error)
            return
        endpoint: Endpoint | None = None
        leader = first if admission.shares_memory else None
        # For want of memory, say. The client is told by the loss of its request.
        with contextlib.suppress(MigrationError):
            endpoint = self._begin(event, admission.reply, admission.options, leader)
        if endpoint is not None:
            endpoint.follow(first)
            self.others[admission.number] = endpoint
            self.events.watch(endpoint)
            if admission.last:
                self.stop()

    def _reject(self, request: Any, error: MigrationError) -> None:
        reason = str(error).encode("ascii", "replace")
        self.events.turn_away(request, reason[:_REASON_MAX])

    def stop(self) -> None:
        """Listen no longer; connections made already, and their events, live on."""
        self.events.post_doorman(None)
        cmid, self._cmid = self._cmid, None
        if cmid is not None:
            cmid.close()

    def close(self) -> None:
        """Close the listener and its event channel, after the endpoints. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        for endpoint in self.others.values():
            endpoint.close()
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
