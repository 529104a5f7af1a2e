# SPDX-License-Identifier: Apache-2.0
"""Figures in the form that Prometheus reads, written and served by prometheus_client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rdma_mig import errors
from rdma_mig.closing import Closing
from rdma_mig.errors import HostError, UsageError
from rdma_mig.metrics.figures import Figures
from rdma_mig.metrics.ports import counters
from rdma_mig.migration.status import MigrationStatus

__all__ = ["Exporter"]

_INTERVAL = 5.0  # seconds between two writings of the file
_KINDS = sorted(
    name
    for name in errors.__all__
    if name != "ExitStatus" and name not in ("MigrationError", "ProtocolError")
)


def _library() -> tuple[Any, Any]:
    try:
        import prometheus_client
        from prometheus_client import core
    except ImportError as error:
        raise HostError(
            "metrics need the library prometheus_client, the extra 'metrics'",
            remedy="pip install 'prometheus_client>=0.16'",
        ) from error
    return prometheus_client, core


class Exporter(Closing):
    """Writes a file from time to time and at the end, serves a port, or both.

    Args:
        figures: what is told.
        role: "incoming" or "outgoing".
        machine: which machine it is about, for the label ``vm``.
        path: the file, such as node_exporter's textfile collector reads; replaced whole. None for
            none.
        address: HOST and port to serve at, 0 for a free port; None for nowhere.
        warn: told, once, that the file cannot be written any more.

    Attributes:
        port: that is served; 0 for none.

    Raises:
        HostError: the library is missing, or the port is taken.
        UsageError: the file cannot be written.
    """

    def __init__(
        self,
        figures: Figures,
        *,
        role: str,
        machine: str,
        path: Path | None,
        address: tuple[str, int] | None,
        warn: Callable[[str], None],
    ) -> None:
        self._stop = threading.Event()
        self._writer: threading.Thread | None = None
        self._server: tuple[Any, threading.Thread] | None = None
        self._path = path
        self._warn = warn
        self._figures = figures
        self._labels = {"role": role, "vm": machine}
        self._client, self._core = _library()
        self._registry = self._client.CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.port = 0
        if path is not None:
            try:
                self._write()
            except OSError as error:
                raise UsageError(
                    f"the metrics cannot be written to {path}: {error.strerror}",
                    remedy="name another file with --metrics-file",
                ) from error
        if address is not None:
            self._serve(*address)
        if path is not None:
            self._writer = threading.Thread(
                target=self._keep_writing, name="rdma-mig-metrics", daemon=True
            )
            self._writer.start()

    def _serve(self, host: str, port: int) -> None:
        try:
            served = self._client.start_http_server(port, host, self._registry)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise HostError(
                f"metrics cannot be served at {host}:{port}: {why}",
                remedy="name another one with --metrics-port",
            ) from error
        self.port = port
        if served is not None:  # before 0.19 there was nothing to close
            self._server = served
            self.port = served[0].server_port

    def _write(self) -> None:
        # To a file beside it, which then takes its name.
        self._client.write_to_textfile(str(self._path), self._registry)

    def _keep_writing(self) -> None:
        while not self._stop.wait(_INTERVAL):
            try:
                self._write()
            except OSError as error:
                self._warn(f"the metrics in {self._path} are not kept up: {error.strerror}")
                return

    def close(self) -> None:
        """Write the last figures, and serve no more. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._writer is not None:
            self._writer.join()
            try:
                self._write()
            except OSError as error:
                self._warn(f"the metrics in {self._path} lack the end: {error.strerror}")
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()

    # ---- the figures, as prometheus_client asks for them ----

    def collect(self) -> Iterator[Any]:
        """Yield all metrics; called by prometheus_client, on any thread."""
        with self._figures as figures:
            yield from list(self._progress(figures))
            yield from list(self._work(figures))
        yield from self._port_counters(figures)

    def _family(
        self, kind: str, name: str, text: str, *samples: tuple[dict[str, str], float]
    ) -> Any:
        """Make a metric of samples; a counter's name gets its ``_total`` from the library."""
        make = self._core.CounterMetricFamily if kind == "counter" else self._core.GaugeMetricFamily
        more = list(samples[0][0]) if samples else []
        family = make(f"rdma_migrate_{name}", text, labels=[*self._labels, *more])
        for labels, value in samples:
            family.add_metric([*self._labels.values(), *labels.values()], value)
        return family

    def _one(self, kind: str, name: str, text: str, value: float) -> Any:
        return self._family(kind, name, text, ({}, value))

    def _progress(self, figures: Figures) -> Iterator[Any]:
        connected, done = figures.connected, figures.completed
        if connected is not None:
            told = {
                "device": connected.device or "",
                "peer": connected.peer,
                "pin_all": str(connected.pin_all).lower(),
                "transport": connected.transport,
            }
            yield self._family("gauge", "info", "Over what the migration runs, 1.", (told, 1))
        state = figures.migration.state if figures.migration is not None else None
        if state is not None:
            stands = [({"status": str(s)}, float(s is state.status)) for s in MigrationStatus]
            yield self._family("gauge", "status", "1 at the migration's present status.", *stands)
        moved = (state.counters.normal_bytes if state else 0) if done is None else done.bytes
        yield self._one(
            "counter",
            "transferred_bytes",
            "RAM moved; at a destination the size of the guest's RAM, when it is whole.",
            moved,
        )
        ram = state.counters if state is not None else None
        pages = {
            "normal": ram.normal_pages if ram else 0,
            "duplicate": ram.duplicate_pages if ram else 0,
            "skipped": ram.skipped_pages if ram else 0,
            "xbzrle": ram.xbzrle_pages if ram else 0,
        }
        yield self._family(
            "counter",
            "pages",
            "Pages of 4 KiB by what became of them; 0 at a destination over RDMA, which does not "
            "see them.",
            *(({"kind": kind}, float(count)) for kind, count in pages.items()),
        )
        yield self._one("counter", "rounds", "RAM phases behind setup.", figures.rounds)
        if done is not None:
            yield self._one(
                "gauge", "device_state_bytes", "Stream behind RAM.", done.device_state_bytes
            )
            yield self._one(
                "gauge", "nonzero_bytes", "RAM in pages that are not zero.", done.nonzero_bytes
            )
            yield self._one("gauge", "setup_seconds", "Preparing memory.", done.setup_seconds)
            yield self._one(
                "gauge", "transfer_seconds", "From setup to the last byte.", done.transfer_seconds
            )
            yield self._one(
                "gauge",
                "writing_seconds",
                "Writing the snapshot (incoming) or loading it (outgoing).",
                done.writing_seconds,
            )
        if (rested := self._downtime(figures)) is not None:
            yield self._one(
                "gauge",
                "downtime_seconds",
                "For how long the guest rested: at a source that has one, from its stop to "
                "completion; at a destination, from the announcement of the last RAM on.",
                rested,
            )

    def _downtime(self, figures: Figures) -> float | None:
        if self._labels["role"] == "incoming":
            if figures.last_phase_at is None or figures.ended_at is None:
                return None
            return figures.ended_at - figures.last_phase_at
        state = figures.migration.state if figures.migration is not None else None
        return state.downtime / 1000 if state is not None and state.downtime else None

    def _work(self, figures: Figures) -> Iterator[Any]:
        yield self._one("counter", "writes", "RDMA writes posted.", figures.writes)
        yield self._one(
            "counter", "written_bytes", "Bytes of RDMA writes posted.", figures.written_bytes
        )
        yield self._one(
            "counter", "registrations", "Registrations of guest memory.", figures.registrations
        )
        yield self._one(
            "counter",
            "registration_seconds",
            "Time that registering guest memory took.",
            figures.registration_seconds,
        )
        yield self._one(
            "gauge", "registered_bytes", "Guest memory registered now.", figures.registered_bytes
        )
        yield self._one(
            "counter",
            "populate_seconds",
            "Time that populating guest memory took.",
            figures.populate_seconds,
        )
        yield self._one(
            "counter", "wait_seconds", "Time spent waiting for the peer.", figures.wait_seconds
        )
        messages = [
            ({"direction": direction, "channel": channel, "type": kind}, float(count))
            for (direction, channel, kind), count in sorted(figures.messages.items())
        ]
        if messages:
            yield self._family(
                "counter", "control_messages", "Control messages by type.", *messages
            )
        yield self._family(
            "counter",
            "errors",
            "Failures by kind.",
            *(({"kind": kind}, float(figures.errors[kind])) for kind in _KINDS),
        )
        yield self._one("counter", "warnings", "Warnings.", figures.warnings)

    def _port_counters(self, figures: Figures) -> Iterator[Any]:
        connected = figures.connected
        if connected is None or connected.device is None or connected.port is None:
            return
        where = {"device": connected.device, "port": str(connected.port)}
        samples = [
            ({**where, "counter": name}, float(value))
            for name, value in counters(connected.device, connected.port).items()
        ]
        if samples:
            yield self._family(
                "counter", "port_counter", "What the kernel counts of the port.", *samples
            )
