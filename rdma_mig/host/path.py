# SPDX-License-Identifier: Apache-2.0
"""The path between two hosts: what both look like, and whether bytes really move.

The two ends meet over TCP, as those of perftest do: a port that speaks RDMA may be a QEMU's, which
does not survive strangers. There they exchange their reports, one line of JSON each way. Then the
asking end migrates a little memory to the other one, since two hosts may connect over RDMA and move
no bytes (containers on a bridged network do).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rdma_mig.errors import (
    HostError,
    MigrationCancelled,
    MigrationError,
    MigrationTimeout,
    PeerGone,
    RemoteProtocolError,
)
from rdma_mig.host.findings import Finding, Level, Report
from rdma_mig.waits import Cancel, Deadline

__all__ = ["DEFAULT_PORT", "ask", "serve"]

DEFAULT_PORT = 18515
"""Where the two ends meet unless told otherwise: the port of perftest's tools."""

_API = 1
_CONNECT_SECONDS = 10.0
_PATH_SECONDS = 60.0
_STEP = 0.2  # how soon a cancellation is noticed
_LINE_MAX = 1 << 20
_FIREWALL = (
    "let RDMA pass between the hosts (RoCE v2: UDP port 4791), and give containers the host's "
    "network"
)


class _Lines:
    """Objects of JSON over a socket, a line each, with limits on length and waiting."""

    def __init__(self, sock: socket.socket, peer: str, cancel: Cancel) -> None:
        self.peer = peer
        self._socket = sock
        self._cancel = cancel
        self._buffer = bytearray()

    def send(self, **value: Any) -> None:
        """Send one."""
        try:
            self._socket.settimeout(_CONNECT_SECONDS)
            self._socket.sendall(json.dumps({"api": _API, **value}).encode() + b"\n")
        except OSError as error:
            raise PeerGone(f"{self.peer} is gone: {error.strerror or error}") from error

    def receive(self, what: str, seconds: float) -> dict[str, Any]:
        """Wait for the next one."""
        deadline = Deadline.after(seconds)
        while b"\n" not in self._buffer:
            self._cancel.check(f"waiting for {what} of {self.peer}")
            if deadline.passed:
                raise MigrationTimeout(
                    f"nothing came from {self.peer} within {seconds:g} s; awaited was {what}"
                )
            try:
                self._socket.settimeout(_STEP)
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise PeerGone(f"{self.peer} is gone: {error.strerror or error}") from error
            if not data:
                raise PeerGone(f"{self.peer} closed the connection; awaited was {what}")
            self._buffer += data
            if len(self._buffer) > _LINE_MAX:
                raise RemoteProtocolError(
                    f"{self.peer} sent more than {_LINE_MAX} bytes for {what}"
                )
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or value.get("api") != _API:
            raise RemoteProtocolError(
                f"{self.peer} is no rdma-migrate doctor of this version",
                remedy="run the same version of rdma-migrate doctor --serve there",
            )
        return value


def ask(
    host: str, port: int, report: Report, cancel: Cancel, device: str | None = None
) -> tuple[Report, Finding]:
    """Exchange reports with a host that serves, and try the path to it.

    Args:
        host, port: where the other end serves.
        report: ours.
        cancel: ends every wait.
        device: the only device of ours to use; None for any.

    Returns:
        the other end's report, and what was found of the path.

    Raises:
        HostError: nobody serves there, or the name does not resolve.
        PeerGone, MigrationTimeout, RemoteProtocolError: the other end does not play its part.
    """
    peer = f"{host}:{port}"
    try:
        sock = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    except OSError as error:
        raise HostError(
            f"{peer} cannot be reached over TCP: {error.strerror or error}",
            remedy="start rdma-migrate doctor --serve there, and let the port pass in firewalls",
        ) from error
    with sock:
        lines = _Lines(sock, peer, cancel)
        lines.send(report=report.as_json())
        answer = lines.receive("its report", _PATH_SECONDS)
        theirs = Report.from_json(answer.get("report"))
        match answer:
            case {"uri": str(uri)}:
                try:
                    finding = _send_sample(uri, device, cancel)
                except MigrationCancelled:
                    raise
                except MigrationError as error:
                    finding = Finding(
                        "path", Level.BLOCKER, error.message, error.remedy or _FIREWALL
                    )
            case {"error": str(why), "remedy": str(remedy)}:
                finding = Finding("path", Level.BLOCKER, f"{peer} takes no RDMA: {why}", remedy)
            case _:
                raise RemoteProtocolError(f"{peer} says neither where it listens nor why not")
        lines.send(path=asdict(finding))
    return theirs, finding


def _send_sample(uri: str, device: str | None, cancel: Cancel) -> Finding:
    from rdma_mig.host.sample import SAMPLE_SIZE, Sample
    from rdma_mig.migration.events import Connected, MigrationEvent
    from rdma_mig.migration.rdma import RdmaOptions, rdma_start_outgoing_migration
    from rdma_mig.migration.state import Migration
    from rdma_mig.verbs.endpoint import EndpointOptions

    routes: list[Connected] = []

    def note(event: MigrationEvent) -> None:
        if isinstance(event, Connected):
            routes.append(event)

    sample = Sample.make()
    with sample.ram, Migration(note) as migration:
        rdma_start_outgoing_migration(
            migration,
            uri,
            ram=sample.ram,
            save=sample.save,
            options=RdmaOptions(
                pin_all=True, total_seconds=_PATH_SECONDS, endpoint=EndpointOptions(device=device)
            ),
        )
        while not migration.wait(_STEP):
            if cancel.requested:
                migration.cancel()
    rate = SAMPLE_SIZE / (1 << 20) / max(sample.transfer_seconds, 1e-9)
    return Finding(
        "path",
        Level.OK,
        f"{SAMPLE_SIZE >> 20} MiB arrived unchanged at some {rate:.0f} MiB/s: {routes[0].route()}",
    )


def serve(
    host: str,
    port: int,
    make_report: Callable[[], Report],
    cancel: Cancel,
    listening: Callable[[str], None],
) -> tuple[Report, Report, Finding]:
    """Answer one host that asks.

    Args:
        host, port: where to listen; port 0 takes a free one.
        make_report: looks at this host.
        cancel: ends every wait.
        listening: told HOST:PORT when a host can ask.

    Returns:
        our report, the other end's, and what that found of the path.

    Raises:
        HostError: this host cannot listen there.
        PeerGone, MigrationTimeout, RemoteProtocolError: the other end does not play its part.
    """
    try:
        family = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.create_server(family[0][4][:2], family=family[0][0])
    except OSError as error:
        raise HostError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            remedy="take an address of this host, and a free port",
        ) from error
    with listener:
        address = listener.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        listening(f"{shown}:{address[1]}")
        sock, peer = _accept(listener, cancel)
    with sock:
        lines = _Lines(sock, peer, cancel)
        theirs = Report.from_json(lines.receive("its report", _CONNECT_SECONDS).get("report"))
        ours = make_report()
        path = _take_sample(sock.getsockname()[0], lines, ours)
    return ours, theirs, path


def _accept(listener: socket.socket, cancel: Cancel) -> tuple[socket.socket, str]:
    listener.settimeout(_STEP)
    while True:
        cancel.check("waiting for a host that asks")
        try:
            sock, peer = listener.accept()
        except TimeoutError:
            continue
        return sock, str(peer[0])


def _take_sample(host: str, lines: _Lines, report: Report) -> Finding:
    """Listen where the other end reached us, and tell it where that is."""
    from rdma_mig.host.sample import receive_sample
    from rdma_mig.migration.rdma import RdmaOptions, rdma_start_incoming_migration
    from rdma_mig.migration.state import Migration

    where = f"[{host}]" if ":" in host else host
    with Migration() as migration:
        try:
            address = rdma_start_incoming_migration(
                f"rdma:{where}:0",
                migration=migration,
                process=receive_sample,
                options=RdmaOptions(
                    accept_seconds=_PATH_SECONDS, total_seconds=_PATH_SECONDS, allow=(lines.peer,)
                ),
            )
        except MigrationError as error:
            lines.send(report=report.as_json(), error=error.message, remedy=error.remedy)
        else:
            lines.send(report=report.as_json(), uri=str(address))
        answer = lines.receive("what it found of the path", 2 * _PATH_SECONDS)
        return Finding.from_json(answer.get("path"))
