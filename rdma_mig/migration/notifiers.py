# SPDX-License-Identifier: Apache-2.0
"""Who wants to know when a migration begins and ends, and who does not want one to begin."""

from __future__ import annotations

import threading
from collections.abc import Callable

from rdma_mig.errors import MigrationError
from rdma_mig.migration.status import MigrationState

__all__ = [
    "Notifier",
    "add_migration_state_change_notifier",
    "blocked_reasons",
    "migrate_add_blocker",
    "migrate_del_blocker",
    "notify",
    "remove_migration_state_change_notifier",
    "require_unblocked",
]

Notifier = Callable[[MigrationState], None]

_lock = threading.Lock()
_notifiers: list[Notifier] = []
_blockers: list[MigrationError] = []


def add_migration_state_change_notifier(notify: Notifier) -> None:
    """Have a function called when the process's migration begins, and when it has ended.

    It is called on the worker thread, with the state: in setup before anything else is done, and
    in a final one after everything else was.
    """
    with _lock:
        _notifiers.append(notify)


def remove_migration_state_change_notifier(notify: Notifier) -> None:
    """Do not call a function any more.

    Raises:
        ValueError: it was not added.
    """
    with _lock:
        _notifiers.remove(notify)


def notify(state: MigrationState) -> list[str]:
    """Call all notifiers, in the order they were added; return what those said that failed."""
    with _lock:
        notifiers = list(_notifiers)
    problems = []
    for notifier in notifiers:
        try:
            notifier(state)
        except Exception as error:
            # A migration does not fail because a spectator did.
            problems.append(f"a notifier failed: {type(error).__name__}: {error}")
    return problems


def migrate_add_blocker(reason: MigrationError) -> None:
    """Prevent migrations out of this process, until the reason is taken back.

    Args:
        reason: what an attempt then raises.
    """
    with _lock:
        _blockers.append(reason)


def migrate_del_blocker(reason: MigrationError) -> None:
    """Take a reason back.

    Raises:
        ValueError: it was not added.
    """
    with _lock:
        for at, blocker in enumerate(_blockers):
            if blocker is reason:
                del _blockers[at]
                return
    raise ValueError(f"no such blocker: {reason}")


def blocked_reasons() -> list[str]:
    """Return why nothing can be migrated out of this process; empty if it can."""
    with _lock:
        return [str(blocker) for blocker in _blockers]


def require_unblocked() -> None:
    """Raise the first reason why nothing can be migrated, if there is one."""
    with _lock:
        if _blockers:
            raise _blockers[0]
