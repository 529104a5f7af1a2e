# SPDX-License-Identifier: Apache-2.0
"""QEMUs with a QMP socket for the commands, and what is left as it was behind one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness import Guest, Qemu, guest_counters
from harness.files import FileBytes
from support import Command, heartbeats_in

from rdma_mig.cli.main import main
from rdma_mig.migration import events

GUEST = Guest.dirtying(4)
#: The most that a source may send where it is to be met in the middle: 64 MiB, mostly zero pages.
SLOW = "1M"


def driven(directory: Path, name: str = "source", *extra: str, **options: Any) -> Qemu:
    """A QEMU with a QMP socket in a directory, beside the harness's own."""
    path = directory / f"{name}.qmp"
    qemu = Qemu(
        guest=options.pop("guest", GUEST),
        name=name,
        extra=["-qmp", f"unix:{path},server=on,wait=off", *extra],
        **options,
    )
    qemu.socket_path = str(path)  # type: ignore[attr-defined]
    return qemu


def waiting(directory: Path, name: str = "destination", *extra: str, **options: Any) -> Qemu:
    """One that waits for a machine."""
    return driven(directory, name, *extra, incoming="defer", **options)


def status_of(*arguments: str) -> int:
    """The exit status of rdma-migrate, which is run in this process: for what ends at once."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(str(end.code))


def socket_of(qemu: Qemu) -> str:
    """The path of the commands' socket."""
    return str(qemu.socket_path)  # type: ignore[attr-defined]


def settings(qemu: Qemu) -> tuple[Any, Any]:
    """All capabilities and parameters of a QEMU's migration."""
    return qemu.qmp("query-migrate-capabilities"), qemu.qmp("query-migrate-parameters")


def assert_runs_on(qemu: Qemu) -> None:
    """The guest goes on, and no heartbeat of it is missing."""
    assert qemu.status() == "running"
    qemu.wait_heartbeat(2)
    printed = heartbeats_in(qemu.serial())
    assert printed == list(range(1, len(printed) + 1))


def assert_proves_its_ram(qemu: Qemu) -> None:
    """The guest runs in a QEMU that it was moved to, with all of its RAM."""
    qemu.wait_heartbeat(3)
    qemu.stop()
    assert guest_counters(qemu.memory(), GUEST).passes > 0


def assert_whole(snapshot: Path) -> None:
    """A snapshot holds RAM as the guest could have left it at one moment."""
    guest_counters(FileBytes(snapshot / "ram" / "0.raw"), GUEST)
    with Command("inspect", snapshot, "--verify") as command:
        command.succeed()


def assert_nothing_left(directory: Path) -> None:
    """No snapshot, and no part of one."""
    assert [path.name for path in directory.iterdir() if path.is_dir()] == []


def check_keys(command: Command) -> list[str]:
    """The names of a command's events, whose keys have to be those of the event."""
    kinds = {kind.event: kind for kind in events.MigrationEvent.__subclasses__()}
    for event in command.events():
        if event["event"] != "failed":
            fields = [field.name for field in dataclasses.fields(kinds[event["event"]])]
            assert [*event] == ["event", *fields]
    return [event["event"] for event in command.events()]
