# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate restore``: a snapshot into a QEMU that is driven by QMP."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rdma_mig.cli.driving import add_driving, add_meeting, events_of, meeting_uri, signalled
from rdma_mig.errors import MigrationError, UsageError

if TYPE_CHECKING:
    from rdma_mig.manager.command import CommandLine
    from rdma_mig.manager.qemu import Qemu
    from rdma_mig.migration.send import SnapshotSource
    from rdma_mig.migration.state import Migration
    from rdma_mig.snapshot import Snapshot

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Send the machine in a snapshot directory to a QEMU, which was started with the same machine and with
-incoming defer (--qmp), or is started for it (--spawn, --trust-recorded-command) and runs on in the
background when it has the machine. The guest runs if it ran when the snapshot was taken, or stays
stopped with --stop.

  rdma-migrate restore DIR --qmp SOCKET
  rdma-migrate restore DIR --spawn -- qemu-system-x86_64 -machine TYPE -m SIZE ...

A recorded command is one more thing in the snapshot that somebody may have changed: it is run only
when asked for, and only if nobody else can write to the directory or what is in it.
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command to an argparse sub-parsers object."""
    parser = commands.add_parser(
        "restore",
        help="send a snapshot to a QEMU, by QMP",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s DIR (--qmp SOCKET | --spawn | --trust-recorded-command) [options] "
        "[-- COMMAND...]",
    )
    parser.add_argument("directory", metavar="DIR", help="snapshot directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--qmp", metavar="SOCKET", help="QMP socket of a QEMU with -incoming defer")
    which.add_argument(
        "--spawn",
        action="store_true",
        help="start the QEMU by the command behind --; -incoming defer and a QMP socket are added "
        "where it has none",
    )
    which.add_argument(
        "--trust-recorded-command",
        action="store_true",
        help="start the QEMU by the command that is recorded in the snapshot",
    )
    parser.add_argument(
        "--uri",
        metavar="URI",
        help="where the QEMU shall listen: rdma:ADDR:PORT, tcp:ADDR:PORT or unix:PATH; by default "
        "a socket that it is given",
    )
    add_meeting(parser)
    add_driving(parser, sending=False)
    _take_command(parser)
    parser.set_defaults(run=run)


def _take_command(parser: argparse.ArgumentParser) -> None:
    """Have the parser leave what stands behind ``--`` as it is, in ``command``.

    argparse would take words from there for DIR, and does so differently from one Python to the
    next.
    """
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        words: Sequence[str] = list(args or ())
        at = words.index("--") if "--" in words else len(words)
        found, rest = parse(words[:at], namespace)
        found.command = words[at + 1 :]
        return found, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def run(args: argparse.Namespace) -> int:
    """Restore a snapshot.

    Raises:
        MigrationError: it failed; the exit status is the error's.
    """
    from rdma_mig.cli.reporting import Reporter
    from rdma_mig.manager.command import CommandLine
    from rdma_mig.manager.spawn import SpawnedQemu
    from rdma_mig.migration.events import Recorded, Spawned
    from rdma_mig.migration.state import Migration
    from rdma_mig.snapshot import Snapshot

    if args.command and not args.spawn:
        raise UsageError("a command behind -- goes with --spawn", remedy="leave one of them out")
    asked = CommandLine.to_spawn(args.command, os.getcwd()) if args.spawn else None
    uri = meeting_uri(
        args.uri,
        args.rdma_device,
        listening=(args.uri or "").startswith("tcp:"),
        remedy="say rdma:ADDR:PORT, tcp:ADDR:PORT or unix:PATH, with an address of the QEMU's host",
    )
    if args.rdma_device is not None and not uri:
        raise UsageError(
            "--rdma-device: it is not said where the QEMU shall listen",
            remedy="--uri rdma:ADDR:PORT, with an address of the QEMU's host",
        )
    reporter = Reporter(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    show = events_of(reporter)
    with contextlib.ExitStack() as stack:
        snapshot = stack.enter_context(Snapshot.open(args.directory))
        migration = stack.enter_context(Migration(show))
        stack.enter_context(signalled(migration.cancel, reporter))
        recorded = snapshot.command()
        line = CommandLine(recorded.arguments, recorded.directory) if recorded else None
        if recorded is not None:
            show(Recorded(recorded.arguments, recorded.directory))
        spawned = None
        if args.trust_recorded_command:
            asked = _trusted(snapshot, line)
        if asked is not None:
            spawned = stack.enter_context(SpawnedQemu(asked, migration.cancellation))
        qmp = spawned.qmp if spawned else args.qmp
        try:
            _restore(args, snapshot, migration, qmp, uri, line, reporter)
        except MigrationError as error:
            if spawned is not None and (why := spawned.end_of(error)):
                raise why from error
            raise
        if spawned is not None:
            spawned.release()
            show(Spawned(spawned.pid, spawned.qmp, str(spawned.log)))
    return 0


def _trusted(snapshot: Snapshot, recorded: CommandLine | None) -> CommandLine:
    """Return the recorded command for another QEMU, if it may be run."""
    from rdma_mig.manager.spawn import require_free_sockets
    from rdma_mig.snapshot import require_trustworthy

    if recorded is None:
        raise UsageError(
            f"no command is recorded in {snapshot.path}",
            remedy="start the QEMU by its command: --spawn -- COMMAND...",
        )
    require_trustworthy(snapshot.path)
    require_free_sockets(recorded)
    return recorded.to_run_again()


def _restore(
    args: argparse.Namespace,
    snapshot: Snapshot,
    migration: Migration,
    qmp: str,
    uri: str,
    recorded: CommandLine | None,
    reporter: Any,
) -> None:
    from rdma_mig.manager.monitor import Monitor
    from rdma_mig.manager.qemu import Qemu
    from rdma_mig.manager.restore import restore
    from rdma_mig.migration.send import SnapshotSource

    with Monitor(qmp, migration.cancellation) as monitor:
        show = migration.emit
        destination = Qemu(monitor, "destination", show)
        if before := snapshot.restorations():
            reporter.warn(
                f"this snapshot was sent to a QEMU before ({before[-1]}): if that guest has run "
                "since, the disks are no longer as this one left them, and if it runs, two guests "
                "would write to them"
            )
        source = SnapshotSource(snapshot)
        capabilities = {"x-ignore-shared"} if snapshot.manifest.shared else set()
        if uri.startswith("rdma:"):
            capabilities |= {destination.return_path(uri)}
            capabilities |= {"rdma-pin-all"} if args.rdma_pin_all else set()
        try:

            def start(has: set[str]) -> None:
                source.load(migration)
                answers = not uri.startswith("rdma:") or destination.return_path(uri) in has
                _send(destination, migration, source, args, uri, return_path=answers)

            restore(
                destination,
                migration,
                start,
                capabilities=capabilities,
                recorded=recorded,
                stop=args.stop,
                cancel=migration.cancellation,
            )
        finally:
            migration.close()
            source.close()


def _send(
    destination: Qemu,
    migration: Migration,
    source: SnapshotSource,
    args: argparse.Namespace,
    uri: str,
    *,
    return_path: bool,
) -> None:
    """Have the QEMU listen, and begin to send; with a return path where it offers one."""
    from rdma_mig.migration.channels import ChannelOptions, start_outgoing
    from rdma_mig.migration.uris import qemu_start_outgoing_migration
    from rdma_mig.wire.uri import FdAddress

    options = ChannelOptions(return_path=return_path, total_seconds=args.timeout)
    if uri:
        rdma = None
        if uri.startswith("rdma:"):
            from rdma_mig.migration.rdma import RdmaOptions
            from rdma_mig.verbs.endpoint import EndpointOptions

            rdma = RdmaOptions(
                pin_all=args.rdma_pin_all,
                endpoint=EndpointOptions(device=args.rdma_device, gid_index=args.gid_index),
            )
        where = destination.listen(uri)
        qemu_start_outgoing_migration(
            migration, where, ram=source.ram, save=source.save, options=options, rdma=rdma
        )
        return
    ours, theirs = socket.socketpair()
    with ours, theirs:
        destination.listen(destination.offer(theirs.fileno()))
        start_outgoing(
            migration,
            FdAddress(ours.detach(), destination.name),
            save=source.save,
            options=options,
        )
