# SPDX-License-Identifier: Apache-2.0
"""Connecting to a destination."""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import threading
from collections.abc import Callable, Iterator

from rdma_mig.errors import HostError, MigrationError, MigrationTimeout, PeerGone
from rdma_mig.verbs import addresses
from rdma_mig.verbs.choice import Choice
from rdma_mig.verbs.endpoint import RNR_RETRY_FOREVER, Endpoint, EndpointOptions
from rdma_mig.verbs.events import (
    ADDR_ERROR,
    ADDR_RESOLVED,
    CONNECT_RESPONSE,
    ESTABLISHED,
    ROUTE_RESOLVED,
    Event,
    EventChannel,
    event_error,
    no_answer,
    nobody_listens,
)
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, Deadline

__all__ = ["connect"]

# How often a request is sent again before the peer's host counts as gone: as often as QEMU does it.
# rxe waits 2.15 s each time, which makes 13 s; with 6 it would be longer than the 15 s that a peer
# may be silent, and 7 means "for ever" to it.
_RETRY = 5


def connect(
    host: str,
    port: int,
    private_data: bytes,
    cancel: Cancel,
    options: EndpointOptions,
    leader: Endpoint | None = None,
) -> Endpoint:
    """Connect to a destination; receives are posted before it learns of us.

    Args:
        host, port: where it listens.
        private_data: sent with the request, at most 56 bytes.
        cancel: ends every wait.
        options: sizes and limits.
        leader: a connection to the same host, whose registered memory this one uses.

    Returns:
        the connection; its private_data is the destination's. It owns its event channel.

    Raises:
        HostError: this host cannot reach it over RDMA.
        PeerGone: nobody listens there, or it rejected us.
        MigrationTimeout, MigrationCancelled: it took too long.
    """
    deadline = Deadline.after(options.connect_seconds)
    choice = Choice.of(options.device, options.gid_index)
    found = addresses.resolve(host, port, cancel, deadline)
    ways = list(_ways(found, choice))
    failures: list[MigrationError] = []
    for number, (candidate, source) in enumerate(ways):
        # What does not answer may not use up the time of those behind it.
        limit = Deadline.after((deadline.remaining or 0) / (len(ways) - number))
        try:
            if isinstance(source, HostError):
                raise source
            return _connect_to(
                candidate, source, choice, private_data, cancel, options, limit, leader
            )
        except (HostError, PeerGone, MigrationTimeout) as error:
            failures.append(_with_advice(error, candidate))
    raise _all_failed(host, failures, choice)


_Source = addresses.SockAddr | HostError | None


def _ways(
    found: list[addresses.SockAddr], choice: Choice
) -> Iterator[tuple[addresses.SockAddr, _Source]]:
    """Each address of the peer's, with each address of ours to reach it from."""
    for candidate in found:
        try:
            for source in choice.sources(candidate):
                yield candidate, source
        except HostError as error:
            yield candidate, error


def _with_advice(error: MigrationError, candidate: addresses.SockAddr) -> MigrationError:
    """Say what an IPv6 address may have to do with it."""
    if candidate[0] == socket.AF_INET6:
        advice = "if that is a QEMU, give its IPv4 address: up to 10.0 it refuses IPv6 on RoCE"
        error.remedy = f"{error.remedy}; {advice}" if error.remedy else advice
    return error


def _all_failed(host: str, failures: list[MigrationError], choice: Choice) -> MigrationError:
    """One error for all addresses that were tried: of the kind that says most."""
    # A peer's answer first. Where a device was asked for, that the way leads over another one says
    # more than that nothing came back over the right one.
    kinds = (PeerGone, MigrationTimeout, HostError)
    for kind in kinds if choice.device is None else (PeerGone, HostError, MigrationTimeout):
        best = [failure for failure in failures if type(failure) is kind]
        if not best:
            continue
        told = list(dict.fromkeys(failure.message for failure in failures))
        if len(told) > 1:
            best[0].message = f"no way to {host} is left: {' - '.join(told)}"
        return best[0]
    return HostError(f"{host} has no address")


def _connect_to(
    candidate: addresses.SockAddr,
    source: addresses.SockAddr | None,
    choice: Choice,
    private_data: bytes,
    cancel: Cancel,
    options: EndpointOptions,
    deadline: Deadline,
    leader: Endpoint | None,
) -> Endpoint:
    from pyverbs.cmid import CMID

    verbs = load()
    packed = addresses.pack(candidate)
    peer = addresses.describe(packed)
    with contextlib.ExitStack() as undo:
        events = EventChannel(options.trace)
        undo.callback(events.close)
        cmid = CMID(creator=events.raw)
        undo.callback(cmid.close)

        def expect(wanted: int, doing: str) -> Event:
            event = events.next(doing, peer, deadline, cancel, about=cmid)
            if event.type != wanted:
                raise event_error(event, doing, peer)
            return event

        def milliseconds() -> int:
            return max(1, int((deadline.remaining or 0) * 1000))

        try:
            try:
                ours = None if source is None else addresses.pack(source)
                verbs.resolve_address(cmid, ours, packed, milliseconds())
            except OSError as error:
                raise event_error(
                    Event(ADDR_ERROR, -(error.errno or 0), 0, b""), "resolving", peer
                ) from error
            expect(ADDR_RESOLVED, "resolving the address")
            choice.check_source(cmid, peer)
            cmid.resolve_route(milliseconds())
            expect(ROUTE_RESOLVED, "resolving the route")
            endpoint = Endpoint(cmid, events, cancel, options, leader)
            undo.callback(endpoint.close)
            request = functools.partial(
                verbs.connect,
                cmid,
                private_data,
                qp_number=endpoint.qp_number,
                read_depth=endpoint.read_depth,
                retry=_RETRY,
                rnr_retry=RNR_RETRY_FOREVER,
            )
            if endpoint.iwarp:
                _wait_aside(request, undo, "connecting", peer, cancel, deadline)
            else:
                request()
            # An iWARP provider completes the handshake by itself.
            event = expect(ESTABLISHED if endpoint.iwarp else CONNECT_RESPONSE, "connecting")
            endpoint.private_data = event.private_data
            endpoint.peer = peer
            choice.check_path(cmid, peer)
            try:
                endpoint.ready_to_receive()
                if not endpoint.iwarp:
                    cmid.establish()
            except (OSError, events._error) as error:
                raise PeerGone(f"{peer} accepted the connection and ended it again") from error
            endpoint.established()
            events.watch(endpoint)
            endpoint.owns_events()
            undo.pop_all()
            return endpoint
        except (OSError, events._error) as error:
            if getattr(error, "errno", None) == errno.ECONNREFUSED:
                # iWARP: TCP connects within the call.
                raise nobody_listens(peer) from error
            raise HostError(f"connecting to {peer} failed: {error}") from error


def _wait_aside(
    call: Callable[[], None],
    undo: contextlib.ExitStack,
    doing: str,
    peer: str,
    cancel: Cancel,
    deadline: Deadline,
) -> None:
    """Make a call that waits in the kernel and takes neither a limit nor a cancellation.

    It is made in a thread of its own. Where that has to be left behind, what the call works on is
    given back when the kernel is through with it: TCP gives up after some two minutes, and at once
    when the process ends.

    Args:
        call: it may raise OSError.
        undo: gives back what it works on; empty when this has raised for want of an answer.
        doing, peer: for messages.
        cancel, deadline: limit of the wait.

    Raises:
        MigrationTimeout, MigrationCancelled: it was left behind.
        OSError: as the call.
    """
    failure: list[OSError] = []

    def work() -> None:
        try:
            call()
        except OSError as error:
            failure.append(error)

    worker = threading.Thread(target=work, name="rdma-mig-connect", daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.05)
            cancel.check(doing)
            if deadline.passed and worker.is_alive():
                raise no_answer(doing, peer, deadline)
    except BaseException:
        rest = undo.pop_all()

        def give_back() -> None:
            worker.join()
            rest.close()

        threading.Thread(target=give_back, name="rdma-mig-connect-end", daemon=True).start()
        raise
    if failure:
        raise failure[0]
