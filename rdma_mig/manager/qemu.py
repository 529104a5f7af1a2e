# SPDX-License-Identifier: Apache-2.0
"""One QEMU as a migration needs it: its settings, its guest's run state, how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rdma_mig.errors import MigrationError, MigrationTimeout, UsageError
from rdma_mig.manager.monitor import Monitor, QemuRefused
from rdma_mig.migration.events import MigrationEvent, QemuProgress, Warned
from rdma_mig.waits import Deadline

__all__ = ["FINAL", "UNLIMITED", "Qemu"]

UNLIMITED = 100_000_000_000
"""A bandwidth that no link has, bytes a second: QEMU's own default is 128 MiB/s."""

FINAL = ("completed", "failed", "cancelled")
"""States of query-migrate that do not change by themselves any more."""

# Beside what is switched on on purpose, these may stay as they are: they change neither the bytes
# on the wire nor what becomes of the source's guest.
_HARMLESS = frozenset({"events", "auto-converge", "zero-blocks", "validate-uuid"})
_SOCKET = "rdma-migrate"
_POSTCOPY = "postcopy-ram"
_PROGRESS_SECONDS = 0.5
_POLL_SECONDS = 0.02
_UNDO_SECONDS = 5.0
# After these, it is looked at the other end again; after those, the QEMU counts as stuck.
_BUSY_SECONDS = 2.0
_SILENT_SECONDS = 120.0
# A QEMU in the middle of connecting over RDMA answers nothing for some 10 s.
_MIGRATE_SECONDS = 30.0
_RESTING = ("paused", "postmigrate", "finish-migrate")


class Qemu:
    """A QEMU behind a monitor.

    Args:
        monitor: closed by its owner, after this.
        end: "source" or "destination".
        emit: told of progress and warnings.
    """

    def __init__(self, monitor: Monitor, end: str, emit: Callable[[MigrationEvent], None]) -> None:
        self.monitor = monitor
        self.name = monitor.name
        self.end = end
        #: What it is at, for messages; a participle.
        self.step = ""
        self.tell = emit
        self._shown = ("", 0.0)
        self._known: dict[str, Any] = {}
        self._answered = time.monotonic()
        version = monitor.execute("query-version")["qemu"]
        self.release = (int(version["major"]), int(version["minor"]))

    # ---- the guest ----

    def status(self, *, cancellable: bool = True) -> str:
        """Return the run state of its guest: "running", "paused", "inmigrate", "postmigrate"."""
        answer = self.monitor.execute(
            "query-status", seconds=_UNDO_SECONDS, cancellable=cancellable
        )
        return str(answer["status"])

    def let_run(self) -> None:
        """Let the guest run; of one that is awaited: once it is there, if it ran before."""
        self.monitor.execute("cont", cancellable=False)

    def keep_stopped(self) -> None:
        """Stop the guest; of one that is awaited: have it stay stopped when it is there."""
        self.monitor.execute("stop", cancellable=False)

    def writable_disks(self) -> list[str]:
        """Return the names of drives that the guest may write to, with their files."""
        found = []
        for drive in self.monitor.execute("query-block"):
            inserted = drive.get("inserted")
            if inserted and not inserted.get("ro", False):
                name = drive.get("device") or drive.get("qdev") or inserted.get("node-name", "?")
                found.append(f"{name} ({inserted.get('file', '?')})")
        return found

    # ---- settings ----

    @contextlib.contextmanager
    def prepared(self, on: set[str], parameters: dict[str, Any]) -> Iterator[set[str]]:
        """Switch these capabilities on and others off, set parameters; and all back at the end.

        Yields:
            those that are on: a QEMU may have refused a return path, and then the other end must
            have none either.

        Raises:
            QemuRefused: a setting is not possible in this QEMU.
        """
        had = {
            entry["capability"]: bool(entry["state"])
            for entry in self.monitor.execute("query-migrate-capabilities")
        }
        if missing := on - had.keys():
            raise MigrationError(
                f"{self.name} has no capability {', '.join(sorted(missing))}",
                remedy="use a QEMU that has it",
            )
        wanted = {name: name in on for name in had if name in on or name not in _HARMLESS}
        values = self.monitor.execute("query-migrate-parameters")
        before = {name: values[name] for name in parameters if name in values}
        if values.get("tls-creds"):
            before["tls-creds"] = values["tls-creds"]
            parameters = {**parameters, "tls-creds": ""}
        changed = {name: had[name] for name, state in wanted.items() if state != had[name]}
        try:
            refused = self._switch({name: wanted[name] for name in changed})
            if parameters:
                self.monitor.execute("migrate-set-parameters", parameters)
            yield on - refused
        finally:
            self._restore(changed, before)

    def _switch(self, states: dict[str, bool]) -> set[str]:
        """Set capabilities; without a return path over RDMA where a QEMU up to 7.2 has none.

        Returns those that were refused.

        postcopy-ram needs userfaultfd, which a QEMU of a plain user often may not use.
        """
        try:
            self._set_capabilities(states, cancellable=True)
        except QemuRefused as error:
            if not states.get(_POSTCOPY):
                raise
            self._set_capabilities(
                {name: state for name, state in states.items() if name != _POSTCOPY},
                cancellable=True,
            )
            self.tell(
                Warned(
                    f"there is no return path: {self.name} refused {_POSTCOPY} ({error.words}), so "
                    "the source lets go of its guest before the destination says that it has it"
                )
            )
            return {_POSTCOPY}
        return set()

    def _set_capabilities(self, states: dict[str, bool], *, cancellable: bool) -> None:
        if states:
            self.monitor.execute(
                "migrate-set-capabilities",
                {
                    "capabilities": [
                        {"capability": name, "state": state} for name, state in states.items()
                    ]
                },
                cancellable=cancellable,
            )

    def _restore(self, capabilities: dict[str, bool], parameters: dict[str, Any]) -> None:
        if not self.monitor.connected:
            return
        try:
            self._set_capabilities(capabilities, cancellable=False)
            if parameters:
                self.monitor.execute("migrate-set-parameters", parameters, cancellable=False)
        except MigrationError as error:
            if self.monitor.connected:
                self.tell(Warned(f"the settings of {self.name} are not as before: {error.message}"))

    def return_path(self, uri: str) -> str:
        """Return the capability that makes a source wait for the destination's word.

        Over RDMA a QEMU up to 7.2 opens a return path with postcopy-ram only.
        """
        rdma = uri.startswith("rdma:")
        return _POSTCOPY if rdma and self.release < (8, 0) else "return-path"

    # ---- its migration ----

    def require_idle(self) -> None:
        """Make sure that it can be a source now.

        Raises:
            UsageError: another migration is under way, or it has no guest yet.
            MigrationError: QEMU says why its guest cannot be migrated.
        """
        known = self.monitor.execute("query-migrate")
        state = known.get("status", "none")
        if state not in ("none", *FINAL):
            raise UsageError(
                f"another migration of {self.name} is under way ({state})",
                remedy="await its end, or cancel it (migrate_cancel)",
            )
        if self.status() == "inmigrate":
            raise UsageError(
                f"{self.name} waits for a machine itself, and has none yet",
                remedy="name the socket of the QEMU that has the guest",
            )
        if reasons := known.get("blocked-reasons"):
            raise MigrationError(f"{self.name} cannot be migrated: {'; '.join(reasons)}")

    def offer(self, fd: int) -> str:
        """Give it one end of a socket, and return the URI that it is for this QEMU.

        Whichever user it runs as, and whatever it sees of the file system, it can use it.
        """
        try:
            self.monitor.give(_SOCKET, fd)
            return f"fd:{_SOCKET}"
        except MigrationError as error:
            error.remedy = error.remedy or (
                "where QEMU is on another host, or forwarded, say where to meet: --uri"
            )
            raise

    def take_back(self) -> None:
        """Have it close the socket of offer(), where it has not used it."""
        with contextlib.suppress(MigrationError):
            self.monitor.execute("closefd", {"fdname": _SOCKET}, cancellable=False)

    def migrate(self, uri: str) -> None:
        """Start its migration to a URI."""
        self.monitor.execute("migrate", {"uri": uri}, seconds=_MIGRATE_SECONDS)

    def listen(self, uri: str) -> str:
        """Have it await a source, and return the URI to connect to."""
        self.monitor.execute("migrate-incoming", {"uri": uri}, seconds=_MIGRATE_SECONDS)
        if not uri.startswith("tcp:") or not uri.endswith(":0"):
            return uri
        for address in self.monitor.execute("query-migrate").get("socket-address", ()):
            if address.get("type") == "inet":
                return f"{uri.removesuffix(':0')}:{address['port']}"
        raise MigrationError(f"{self.name} does not say where it listens", remedy="name a port")

    def progress(self, *, cancellable: bool = True) -> dict[str, Any]:
        """Ask how its migration is, tell it on, and return the answer.

        While a QEMU sends device state, or waits for its peer with its guest stopped, it answers
        nothing. Then this is what it said last.

        Raises:
            MigrationTimeout: it has not answered for two minutes.
        """
        try:
            known = self._query(_BUSY_SECONDS, cancellable=cancellable)
        except MigrationTimeout:
            if time.monotonic() - self._answered > _SILENT_SECONDS:
                raise
            return self._known
        self._answered, self._known = time.monotonic(), known
        return known

    def _query(self, seconds: float, *, cancellable: bool) -> dict[str, Any]:
        known: dict[str, Any] = self.monitor.execute(
            "query-migrate", seconds=seconds, cancellable=cancellable
        )
        state = str(known.get("status", "none"))
        now = time.monotonic()
        if state != self._shown[0] or now - self._shown[1] >= _PROGRESS_SECONDS:
            self._shown = (state, now)
            ram = known.get("ram", {})
            self.tell(
                QemuProgress(
                    end=self.end,
                    status=state,
                    transferred=int(ram.get("transferred", 0)),
                    remaining=int(ram.get("remaining", 0)),
                    total=int(ram.get("total", 0)),
                    rounds=int(ram.get("dirty-sync-count", 0)),
                    bytes_per_second=round(float(ram.get("mbps", 0)) * 1e6 / 8, 1),
                    dirty_bytes_per_second=float(
                        ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)
                    ),
                    expected_downtime_ms=int(known.get("expected-downtime", 0)),
                )
            )
        return known

    def cancel(self, seconds: float) -> dict[str, Any]:
        """Cancel its migration, if it has one, and return how that ended.

        Raises:
            MigrationTimeout: it does not answer, or does not end it, within so many seconds.
        """
        deadline = Deadline.after(seconds)

        def left() -> float:
            return deadline.remaining or 0.01

        known = self._query(left(), cancellable=False)
        if known.get("status", "none") not in ("none", *FINAL):
            self.monitor.execute("migrate_cancel", seconds=left(), cancellable=False)
        while known.get("status", "none") not in ("none", *FINAL):
            if deadline.passed:
                raise MigrationTimeout(
                    f"{self.name} has not cancelled its migration within {seconds:g} s"
                )
            time.sleep(_POLL_SECONDS)
            known = self._query(left(), cancellable=False)
        return known

    def run_on(self, *, running: bool) -> str:
        """See to it that the guest is as it was before a migration that failed; say in words.

        Args:
            running: whether it ran.
        """
        state = self.status(cancellable=False)
        end = time.monotonic() + _UNDO_SECONDS
        while running and state == "finish-migrate" and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            state = self.status(cancellable=False)
        if running and state in _RESTING:
            self.let_run()
            state = self.status(cancellable=False)
        if running and state != "running":
            return f"the guest of {self.name} is {state}"
        return (
            f"the guest runs on in {self.name}"
            if running
            else (f"the guest rests in {self.name}, as before")
        )
