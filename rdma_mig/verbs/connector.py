# SPDX-License-Identifier: Apache-2.0
"""Connecting to a destination."""

from __future__ import annotations

from rdma_mig.errors import HostError, MigrationError, PeerGone
from rdma_mig.verbs import addresses
from rdma_mig.verbs.endpoint import RNR_RETRY_FOREVER, Endpoint, EndpointOptions
from rdma_mig.verbs.events import (
    ADDR_ERROR,
    ADDR_RESOLVED,
    CONNECT_RESPONSE,
    ROUTE_RESOLVED,
    Event,
    EventChannel,
    event_error,
)
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, Deadline

__all__ = ["connect"]

# How often a request is sent again before the peer's host counts as gone: as often as QEMU does it.
# rxe waits 2.15 s each time, which makes 13 s; with 6 it would be longer than the 15 s that a peer
# may be silent, and 7 means "for ever" to it.
_RETRY = 5


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
            raise event_error(event, doing, peer)
        return event

    def milliseconds() -> int:
        return max(1, int((deadline.remaining or 0) * 1000))

    try:
        try:
            verbs.resolve_address(cmid, None, packed, milliseconds())
        except OSError as error:
            raise event_error(
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
            rnr_retry=RNR_RETRY_FOREVER,
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
