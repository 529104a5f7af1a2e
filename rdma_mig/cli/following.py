# SPDX-License-Identifier: Apache-2.0
"""Everybody who follows a migration of the command line: reporter, trace, metrics."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rdma_mig.cli.reporting import Reporter, tracing_to
from rdma_mig.errors import MigrationError
from rdma_mig.migration.state import Migration
from rdma_mig.tracing import Observer, Observers

if TYPE_CHECKING:
    from rdma_mig.metrics.figures import Figures
    from rdma_mig.migration.events import MigrationEvent

__all__ = ["Followers", "following"]


class Followers:
    """Is told of events and of the failure, and passes them on.

    Args:
        reporter: prints.
        observer: told in detail; None for nobody.
        figures: counts; None where nobody asks for figures.
    """

    def __init__(
        self, reporter: Reporter, observer: Observer | None, figures: Figures | None
    ) -> None:
        self._reporter = reporter
        self._observer = observer
        self._figures = figures

    def migration(self) -> Migration:
        """Make the migration that they follow."""
        migration = Migration(self, Observers.of(self._observer, self._figures))
        self._reporter.follow(migration)
        if self._figures is not None:
            self._figures.migration = migration
        return migration

    def __call__(self, event: MigrationEvent) -> None:
        """Pass an event on."""
        if self._figures is not None:
            self._figures.event(event)
        self._reporter(event)

    def failed(self, error: MigrationError) -> None:
        """Pass the failure on."""
        if self._figures is not None:
            self._figures.failed(error)
        self._reporter.failed(error)


@contextlib.contextmanager
def following(
    args: argparse.Namespace, role: str, machine: str, reporter: Reporter
) -> Iterator[Followers]:
    """Set up what the command line asks for.

    Args:
        args: with what `options.add_common` has.
        role: "incoming" or "outgoing".
        machine: path of the snapshot, whose last part is what metrics call the machine.
        reporter: prints.

    Raises:
        UsageError: a file cannot be written.
        HostError: a port is taken, or a library is missing.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(reporter.close)
        figures = None
        if args.metrics_file is not None or args.metrics_port is not None:
            from rdma_mig.metrics.figures import Figures
            from rdma_mig.metrics.prometheus import Exporter

            figures = Figures()
            exporter = stack.enter_context(
                Exporter(
                    figures,
                    role=role,
                    machine=Path(machine).resolve().name,
                    path=args.metrics_file,
                    address=args.metrics_port,
                    warn=reporter.warn,
                )
            )
            if args.metrics_port is not None:
                reporter.note(f"metrics at http://{args.metrics_port[0]}:{exporter.port}/metrics")
        trace = stack.enter_context(tracing_to(args.trace, role, reporter))
        yield Followers(reporter, trace, figures)
