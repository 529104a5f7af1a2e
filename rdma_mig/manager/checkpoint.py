# SPDX-License-Identifier: Apache-2.0
"""A running QEMU's machine into a snapshot, with its guest running on afterwards, or resting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rdma_mig.errors import MigrationError, PeerGone, SnapshotError
from rdma_mig.manager.qemu import FINAL, Qemu
from rdma_mig.migration.events import GuestState, Warned
from rdma_mig.migration.state import Migration, MigrationStatus
from rdma_mig.snapshot import SnapshotWriter
from rdma_mig.snapshot.leftovers import find, remove
from rdma_mig.waits import Cancel

__all__ = ["CheckpointOptions", "checkpoint", "settle", "undo", "warn_of_disks"]

_POLL_SECONDS = 0.05
# What the other end may take to notice that one end has ended.
_END_SECONDS = 10.0
_UNDO_SECONDS = 5.0
# Under this, a cancellation is through within two seconds.
_CANCEL_SECONDS = 1.0
# How long a QEMU may take to notice that its peer is gone, which over RDMA it does late.
_STUCK_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """How to go about it.

    Attributes:
        uri: scheme and more of where the ends meet, to choose capabilities by; empty for a private
            socket.
        pin_all: register all RAM at the start, over RDMA.
        stop: leave the guest stopped; else it is as it was before.
        bandwidth: bytes a second that QEMU may send at most.
        downtime_ms: most milliseconds that QEMU plans for the end; None for what it is set to.
    """

    uri: str
    pin_all: bool
    stop: bool
    bandwidth: int
    downtime_ms: int | None

    def parameters(self) -> dict[str, Any]:
        """Return QEMU's migration parameters."""
        found: dict[str, Any] = {"max-bandwidth": self.bandwidth}
        if self.downtime_ms is not None:
            found["downtime-limit"] = self.downtime_ms
        return found

    def capabilities(self, qemu: Qemu, *, return_path: bool = True) -> set[str]:
        """Return those that have to be on."""
        pinned = {"rdma-pin-all"} if self.pin_all else set()
        return {qemu.return_path(self.uri), *pinned} if return_path else pinned


def warn_of_disks(source: Qemu) -> None:
    """Warn of disks that the guest goes on writing to."""
    if disks := source.writable_disks():
        source.tell(
            Warned(
                f"the guest has writable disks, which are not in the snapshot and go on changing: "
                f"{', '.join(disks)}; copy them while the guest is stopped (--stop), or take "
                "snapshots of them at the same time"
            )
        )


def checkpoint(
    source: Qemu,
    migration: Migration,
    writer: SnapshotWriter,
    start: Callable[[], str],
    options: CheckpointOptions,
    cancel: Cancel,
) -> None:
    """Have a QEMU migrate to this process, and its guest go on.

    Args:
        source: the QEMU.
        migration: receives; started by ``start``.
        writer: of the snapshot.
        start: begins to listen, and returns the URI for the QEMU.
        options: how to go about it.
        cancel: ends it; the guest then goes on as before.

    Raises:
        MigrationError: it failed; ``owner`` says how the guest is.
    """
    source.require_idle()
    running = source.status() == "running"
    if running and not options.stop:
        warn_of_disks(source)
    with source.prepared(options.capabilities(source), options.parameters()):
        try:
            source.step = "starting QEMU's migration"
            uri = start()
            source.migrate(uri)
            source.step = "migrating"
            _follow(source, migration, cancel)
        except MigrationError as error:
            undo(source, migration, writer, error, running=running)
            raise
        # The snapshot is whole, and neither a cancellation nor QEMU's end changes that any more.
        try:
            source.step = "letting the guest run on"
            _await_completion(source)
            if running and not options.stop:
                source.let_run()
            state = source.status(cancellable=False)
        except MigrationError as error:
            error.owner, error.step = f"the snapshot in {writer.path} is whole", source.step
            raise
    source.tell(GuestState(source.monitor.path, state))


def _await_completion(source: Qemu) -> None:
    """Wait until QEMU has completed too; with a snapshot that is whole that is a matter of time."""
    end = time.monotonic() + _END_SECONDS
    while source.progress(cancellable=False).get("status", "none") not in FINAL:
        if time.monotonic() > end:
            source.tell(Warned(f"{source.name} did not say that its migration has ended"))
            return
        time.sleep(_POLL_SECONDS)


def _follow(source: Qemu, migration: Migration, cancel: Cancel) -> None:
    """Follow both ends until ours is through."""
    while not migration.wait(0.0):
        cancel.check(source.step)
        known = source.progress()
        state = known.get("status", "none")
        if state in ("failed", "cancelled"):
            words = known.get("error-desc", "")
            ours = _await_end(migration, _CANCEL_SECONDS)
            if ours is not None and not isinstance(ours, PeerGone):
                raise ours  # which is why QEMU's end failed
            raise MigrationError(
                f"the migration of {source.name} "
                + ("failed" if state == "failed" else "was cancelled")
                + (f": {words}" if words else "")
            )
        cancel.wait(_POLL_SECONDS)


def _await_end(migration: Migration, seconds: float) -> MigrationError | None:
    """Wait for our end's worker, and return what it failed with."""
    try:
        migration.wait(seconds)
    except MigrationError as error:
        return error
    return None


def settle(
    source: Qemu, migration: Migration | None, error: MigrationError, *, running: bool
) -> bool:
    """Cancel what goes on, and see to the guest; put into ``error`` what is known then.

    Args:
        source: the QEMU whose guest was to be migrated.
        migration: our own end; None where both are QEMUs.
        error: why it failed.
        running: whether the guest ran before.

    Returns:
        whether the QEMU is known to have its machine.
    """
    known: dict[str, Any] = {}
    has_it = False
    with contextlib.suppress(MigrationError):
        known = source.cancel(_CANCEL_SECONDS)
    if migration is not None:
        # This frees a QEMU that waits for us and answers nothing.
        migration.cancel()
        _await_end(migration, _UNDO_SECONDS)
    try:
        known = source.cancel(_STUCK_SECONDS)
        source.take_back()
        error.owner = source.run_on(running=running)
        has_it = True
    except MigrationError as gone:
        error.owner = f"who has the machine is not known: {gone.message}"
        error.remedy = gone.remedy or error.remedy
        if not source.monitor.connected:
            error.owner = "its QEMU is gone, and the machine with it"
            if gone.message not in error.message:
                # That a connection broke is the same once more.
                also = "" if isinstance(error, PeerGone) else f"; {error.message}"
                error.message = gone.message + also
            error.remedy = gone.remedy
            # Who is killed breaks no protocol, although its stream is cut.
            error.exit_status = gone.exit_status
    words = str(known.get("error-desc", ""))
    if words and words not in error.message:
        error.message += f"; QEMU says: {words}"
    if not error.step:
        error.step = source.step
    return has_it


def undo(
    source: Qemu,
    migration: Migration,
    writer: SnapshotWriter,
    error: MigrationError,
    *,
    running: bool,
) -> None:
    """Cancel what goes on, see to the guest, and remove what arrived if the guest goes on.

    Args:
        source: the QEMU.
        migration: our own end.
        writer: of the snapshot that was to be.
        error: why it failed; gets what is known then.
        running: whether the guest ran before.
    """
    has_it = settle(source, migration, error, running=running)
    if migration.state.status is MigrationStatus.COMPLETED:
        # It was faster than what ended it.
        whole = f"the snapshot in {writer.path} is whole"
        error.owner = f"{whole}, and {error.owner}" if has_it else whole
    kept = writer.kept_at
    if kept is None:
        return
    if not has_it:
        error.remedy = f"what arrived is kept in {kept}: rdma-migrate recover {kept}"
        return
    # Made for the case that nobody has the machine any more; its QEMU has.
    error.remedy = ""
    try:
        for left in find(writer.path):
            if left.path == kept:
                remove(left)
    except SnapshotError as problem:
        source.tell(Warned(f"{kept} is left: {problem.message}"))
