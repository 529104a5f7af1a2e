# SPDX-License-Identifier: Apache-2.0
"""The path between two hosts: what both look like, and whether bytes really move.

The two ends meet over TCP and exchange their reports (rdma_mig.host.meeting). Then the asking end
migrates a little memory to the other one, since two hosts may connect over RDMA and move no bytes
(containers on a bridged network do).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from rdma_mig.errors import (
    MigrationCancelled,
    MigrationError,
    RemoteProtocolError,
)
from rdma_mig.host.findings import Finding, Level, Report
from rdma_mig.host.meeting import Meeting, await_other, join
from rdma_mig.waits import Cancel

__all__ = ["ask", "serve"]

_CONNECT_SECONDS = 10.0
_PATH_SECONDS = 60.0
_STEP = 0.2  # how soon a cancellation is noticed
_FIREWALL = (
    "let RDMA pass between the hosts (RoCE v2: UDP port 4791), and give containers the host's "
    "network"
)


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
    with join(host, port, cancel, "doctor") as lines:
        peer = lines.peer
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
    with await_other(host, port, cancel, "doctor", listening) as lines:
        theirs = Report.from_json(lines.receive("its report", _CONNECT_SECONDS).get("report"))
        ours = make_report()
        path = _take_sample(lines.local_host, lines, ours)
    return ours, theirs, path


def _take_sample(host: str, lines: Meeting, report: Report) -> Finding:
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
                    accept_seconds=_PATH_SECONDS,
                    total_seconds=_PATH_SECONDS,
                    allow=(lines.peer_host,),
                ),
            )
        except MigrationError as error:
            lines.send(report=report.as_json(), error=error.message, remedy=error.remedy)
        else:
            lines.send(report=report.as_json(), uri=str(address))
        answer = lines.receive("what it found of the path", 2 * _PATH_SECONDS)
        return Finding.from_json(answer.get("path"))
