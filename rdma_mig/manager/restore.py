# SPDX-License-Identifier: Apache-2.0
"""A snapshot into a QEMU that waits for it (``-incoming defer``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rdma_mig.errors import MigrationError, MigrationTimeout, PeerGone, UsageError
from rdma_mig.manager.command import CommandLine
from rdma_mig.manager.monitor import QemuRefused
from rdma_mig.manager.qemu import Qemu
from rdma_mig.migration.events import GuestState
from rdma_mig.migration.state import Migration
from rdma_mig.waits import Cancel

__all__ = ["await_guest", "restore", "wait_for_defer"]

_POLL_SECONDS = 0.05
# From the last byte of the stream to a guest that runs, or rests.
_GUEST_SECONDS = 30.0
_END_SECONDS = 5.0


def wait_for_defer(destination: Qemu, recorded: CommandLine | None) -> None:
    """Make sure that a QEMU was started with ``-incoming defer``.

    Args:
        destination: the QEMU.
        recorded: how one for this machine is started, if that is known better than from the QEMU.

    Raises:
        UsageError: it was not; with a command line that can be pasted.
    """
    state = destination.status()
    if state == "inmigrate":
        return
    raise not_waiting(destination, recorded, f"it is {state}")


def not_waiting(destination: Qemu, recorded: CommandLine | None, why: str) -> UsageError:
    """Return the error for a QEMU that waits for no machine, or elsewhere."""
    process = destination.monitor.process
    own = process.command_line() if process else None
    line = own or recorded or CommandLine(("qemu-system-x86_64", "..."), "")
    line = line.waiting()
    if line.qmp_socket() is None:
        line = line.reachable(destination.monitor.path)
    return UsageError(
        f"{destination.name} does not wait for a machine to be restored ({why})",
        remedy=f"start it with -incoming defer: {line}",
    )


def restore(
    destination: Qemu,
    migration: Migration,
    start: Callable[[set[str]], None],
    *,
    capabilities: set[str],
    recorded: CommandLine | None,
    stop: bool,
    cancel: Cancel,
) -> None:
    """Have a QEMU await our end, and send the snapshot.

    Args:
        destination: the QEMU.
        migration: sends; started by ``start``.
        start: has the QEMU listen, and begins to send; told which of the capabilities are on.
        capabilities: those that have to be on in the QEMU.
        recorded: how the QEMU of the snapshot was started.
        stop: leave the guest stopped; else it runs if it ran.
        cancel: ends it.

    Raises:
        MigrationError: it failed; the snapshot is as before.
    """
    wait_for_defer(destination, recorded)
    with destination.prepared(capabilities, {}) as has:
        try:
            destination.step = "having QEMU listen"
            await_guest(destination, stop=stop)
            try:
                start(has)
            except QemuRefused as error:
                if "already" not in error.words:
                    raise
                raise not_waiting(destination, recorded, error.words) from None
            destination.step = "restoring"
            state = _follow(destination, migration, cancel)
        except MigrationError as error:
            _explain(destination, migration, error)
            raise
    destination.tell(GuestState(destination.monitor.path, state))


def await_guest(destination: Qemu, *, stop: bool) -> None:
    """Say to a QEMU that waits for a machine what shall become of it."""
    if stop:
        destination.keep_stopped()
    else:
        destination.let_run()


def _follow(destination: Qemu, migration: Migration, cancel: Cancel) -> str:
    end = 0.0
    while True:
        over = migration.wait(0.0)
        if over and not end:
            end = time.monotonic() + _GUEST_SECONDS
        destination.progress(cancellable=not over)
        if over:
            state = destination.status(cancellable=False)
            if state != "inmigrate":
                return state
            if time.monotonic() > end:
                raise MigrationTimeout(
                    f"the guest of {destination.name} is not there {_GUEST_SECONDS:g} s after all "
                    "was sent",
                    remedy="see its messages, and info migrate",
                )
        cancel.wait(_POLL_SECONDS)


def _explain(destination: Qemu, migration: Migration, error: MigrationError) -> None:
    """End what goes on, and put into the error what QEMU has said, and who has the machine."""
    migration.cancel()
    try:
        migration.wait(_END_SECONDS)
    except MigrationError as ours:
        error.owner = error.owner or ours.owner
    words, known = destination.monitor.words(), dict[str, Any]()
    if not words:
        try:
            known = destination.progress(cancellable=False)
            words = str(known.get("error-desc", ""))
        except MigrationError:
            words = destination.monitor.words()
    if words and words not in error.message:
        said = f"{destination.name} says: {words}"
        # That a connection broke says less than why.
        error.message = said if isinstance(error, PeerGone) else f"{error.message}; {said}"
    if not error.step:
        error.step = destination.step
    error.owner = error.owner or "the snapshot is unchanged"
