# SPDX-License-Identifier: Apache-2.0
"""A running guest from one QEMU into another; this process moves no bytes of it."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

from rdma_mig.errors import MigrationError, MigrationTimeout, PeerGone
from rdma_mig.manager.checkpoint import CheckpointOptions, settle
from rdma_mig.manager.monitor import QemuRefused
from rdma_mig.manager.qemu import FINAL, Qemu
from rdma_mig.manager.restore import await_guest, not_waiting, wait_for_defer
from rdma_mig.migration.events import GuestState, Migrated
from rdma_mig.waits import Cancel, Deadline

__all__ = ["handover"]

_POLL_SECONDS = 0.05
_GUEST_SECONDS = 30.0


def handover(
    source: Qemu,
    destination: Qemu,
    options: CheckpointOptions,
    cancel: Cancel,
    deadline: Deadline,
) -> None:
    """Migrate a guest.

    Args:
        source: has the guest; keeps it, stopped, when all is done.
        destination: was started with ``-incoming defer``.
        options: how, and where they meet: an address of the destination's; ``stop`` is about the
            guest at the destination.
        cancel: ends it; the guest then runs on at the source.
        deadline: of it all.

    Raises:
        MigrationError: it failed; ``owner`` says who has the machine.
    """
    source.require_idle()
    running = source.status() == "running"
    wait_for_defer(destination, None)
    with contextlib.ExitStack() as settings:
        enter = settings.enter_context
        has = enter(destination.prepared(options.capabilities(destination), {}))
        # A source that opens a return path to a QEMU which offers none gets no answer.
        wanted = options.capabilities(
            source, return_path=destination.return_path(options.uri) in has
        )
        enter(source.prepared(wanted, options.parameters()))
        listening = False
        try:
            source.step = "having the destination listen"
            await_guest(destination, stop=options.stop)
            uri = _meet(source, destination, options.uri)
            listening = True
            source.step = "starting the source's migration"
            source.migrate(uri)
            source.step = "migrating"
            known = _follow(source, destination, cancel, deadline)
        except MigrationError as error:
            _undo(source, destination, error, running=running, listening=listening)
            raise
        state = _await_guest(destination)
    source.tell(_summary(source, destination, options.uri, known))
    source.tell(GuestState(destination.monitor.path, state))


def _meet(source: Qemu, destination: Qemu, uri: str) -> str:
    """Have the destination listen, and return the URI for the source."""
    try:
        if uri:
            return destination.listen(uri)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            destination.listen(destination.offer(theirs.fileno()))
            return source.offer(ours.fileno())
    except QemuRefused as error:
        if "already" not in error.words:
            raise
        raise not_waiting(destination, None, error.words) from None


def _follow(source: Qemu, destination: Qemu, cancel: Cancel, deadline: Deadline) -> dict[str, Any]:
    """Follow both ends until the source is done, and return what it says then."""
    while True:
        known = source.progress()
        state = known.get("status", "none")
        if state == "completed":
            return known
        if state in FINAL:
            words = known.get("error-desc", "")
            raise MigrationError(
                f"the migration of {source.name} "
                + ("failed" if state == "failed" else "was cancelled")
                + (f": {words}" if words else "")
            )
        destination.progress()
        cancel.check(source.step)
        if deadline.passed:
            raise MigrationTimeout(
                f"the migration from {source.name} to {destination.name} was not through within "
                f"{deadline.seconds:g} s",
                remedy="allow more (--timeout), or less dirtying: --max-bandwidth, "
                "--downtime-limit",
            )
        cancel.wait(_POLL_SECONDS)


def _await_guest(destination: Qemu) -> str:
    """Wait until the destination has the guest, and return its run state."""
    end = time.monotonic() + _GUEST_SECONDS
    try:
        while (state := destination.status(cancellable=False)) == "inmigrate":
            destination.progress(cancellable=False)
            if time.monotonic() > end:
                raise MigrationTimeout(
                    f"the guest of {destination.name} is not there {_GUEST_SECONDS:g} s after the "
                    "source was done"
                )
            time.sleep(_POLL_SECONDS)
    except MigrationError as error:
        # It may have run there: nothing is resumed on a guess.
        error.owner = "the source has let go of its guest, which rests there (postmigrate)"
        error.remedy = "once it is sure that the destination is gone, `cont` resumes it there"
        raise
    return state


def _undo(
    source: Qemu, destination: Qemu, error: MigrationError, *, running: bool, listening: bool
) -> None:
    settle(source, None, error, running=running)
    # A destination ends when its migration fails, and what it says then tells why.
    with contextlib.suppress(MigrationError):
        destination.progress(cancellable=False)
    words = destination.monitor.words()
    if words and words not in error.message:
        said = f"{destination.name} says: {words}"
        broke = isinstance(error, PeerGone) and source.monitor.connected
        error.message = said if broke else f"{error.message}; {said}"
    if destination.monitor.connected:
        destination.take_back()
        if listening:
            error.remedy = "; ".join(
                part
                for part in (error.remedy, f"{destination.name} still listens: end it (quit)")
                if part
            )


def _summary(source: Qemu, destination: Qemu, uri: str, known: dict[str, Any]) -> Migrated:
    ram = known.get("ram", {})
    return Migrated(
        source=source.monitor.path,
        destination=destination.monitor.path,
        uri=uri or "fd:",
        bytes=int(ram.get("transferred", 0)),
        rounds=int(ram.get("dirty-sync-count", 0)),
        setup_seconds=known.get("setup-time", 0) / 1000,
        total_seconds=known.get("total-time", 0) / 1000,
        downtime_seconds=known.get("downtime", 0) / 1000,
        bytes_per_second=round(float(ram.get("mbps", 0)) * 1e6 / 8, 1),
    )
