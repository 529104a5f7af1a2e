# SPDX-License-Identifier: Apache-2.0
"""The process that finishes a snapshot when the one that receives it was killed.

    python -m rdma_mig.snapshot.custodian DIR.partial-PID

``incoming`` starts it with one end of a Unix socket as standard input, and hands it guest RAM, in
memfds, when it is about to let the source go while RAM is in memory only. From then on RAM outlives
``incoming``. A word of it tells that it has ended in order: then nothing is touched here. Where the
connection ends without that word (SIGKILL, a crash, want of memory), RAM is written, the snapshot
completed, and kept as ``DIR.incomplete``; or, where it is not whole, left as it is.

Everything is imported before it is needed: what is on disk may be another version by then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from rdma_mig.errors import MigrationError, SnapshotError
from rdma_mig.memory import GuestMemory
from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.entrusted import DONE, READY, TAKEN, Entrusted
from rdma_mig.snapshot.leftovers import name_incomplete
from rdma_mig.snapshot.manifest import RAM, WRITTEN, BlockRecord, ram_file
from rdma_mig.snapshot.ram import Room, write_block
from rdma_mig.snapshot.recovery import LEFT, complete, note_written, state_is_whole
from rdma_mig.words import printable

__all__ = ["finish", "guard", "main"]

_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_AT_SOURCE: Final = (
    "the source has the virtual machine: `cont` there resumes it (QEMU: postmigrate), if it does "
    "not run already"
)


def finish(entrusted: Entrusted, left: Path) -> Path | None:
    """Finish a snapshot that nobody works on any more.

    Args:
        entrusted: what was handed over.
        left: the partial's name.

    Returns:
        Where it is kept, whole; None when it has got a name already.

    Raises:
        MigrationError: it is not whole, or cannot be written. It stays what a killed run leaves.
    """
    if not _has_its_name(left.name, entrusted):
        return None
    directory = entrusted.directory
    if not state_is_whole(left, directory):
        raise SnapshotError(
            f"{printable(left)} lacks device state", owner=_AT_SOURCE, remedy="migrate again"
        )
    with _fs.failing("write", left):
        try:
            os.stat(WRITTEN, dir_fd=directory)
        except FileNotFoundError:
            _write_ram(entrusted, left)
    complete(left, directory, entrusted.lock)
    with _fs.failing("write", left):
        os.unlink(WRITTEN, dir_fd=directory)
        os.fsync(directory)
    match = LEFT.fullmatch(left.name)
    assert match is not None
    name = name_incomplete(entrusted.parent, left.name, match["of"])
    return left if name is None else left.with_name(name)


def _has_its_name(name: str, entrusted: Entrusted) -> bool:
    """Whether the partial is still called so: it gets another name at one stroke, at the end."""
    try:
        there = os.stat(name, dir_fd=entrusted.parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(entrusted.directory))


def _write_ram(entrusted: Entrusted, left: Path) -> None:
    records: list[BlockRecord] = []
    with _fs.closing(_fs.open_directory(RAM, entrusted.directory)) as ram:
        for index, (record, fd) in enumerate(
            zip(entrusted.manifest.blocks, entrusted.memories, strict=True)
        ):
            with (
                _fs.failing("write", left / RAM / ram_file(index)),
                GuestMemory.adopt(fd, record.block.idstr) as memory,
            ):
                # Whether each page was looked at is not handed over.
                room = Room(record.block.length, exact=False)
                records.append(
                    write_block(
                        ram, index, record.block, memory, stop=None, progress=None, room=room
                    )
                )
    note_written(entrusted.directory, replace(entrusted.manifest, blocks=tuple(records)))


def _take(channel: socket.socket) -> Entrusted | None:
    """Wait for what is handed over; None where the other end ends first: it let go of nothing."""
    try:
        channel.sendall(READY)
        entrusted = Entrusted.receive(channel)
        if entrusted is not None:
            channel.sendall(TAKEN)
    except ConnectionError:
        return None
    return entrusted


def _ended_in_order(channel: socket.socket) -> bool:
    """Wait for the end of the process at the other end; return whether it announced that."""
    try:
        return channel.recv(1) == DONE
    except ConnectionError:
        return False


def guard(channel: socket.socket, left: Path) -> str:
    """Wait for the end of the process at the other end, and finish what it could not.

    Args:
        channel: to it.
        left: the partial's name.

    Returns:
        What is to be said about it; empty for nothing.

    Raises:
        OSError: nothing could be taken.
    """
    entrusted = _take(channel)
    if entrusted is None or _ended_in_order(channel):
        return ""
    killed = "incoming was killed behind the commit point"
    try:
        kept = finish(entrusted, left)
    except (MigrationError, OSError) as error:
        return f"{killed}: {error}"
    if kept is None:
        return ""
    shown = printable(kept)
    return (
        f"{killed}; all had arrived, and is kept whole in {shown}: if the source is in postmigrate "
        f"(`info status` there), rdma-migrate recover {shown} makes a snapshot of it, and else the "
        "source has the machine"
    )


def main(arguments: list[str]) -> None:
    """Be the custodian of the partial that is named."""
    # It ends with the one at the other end, and is nobody else's to stop.
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        with socket.socket(fileno=0) as channel:
            said = guard(channel, Path(arguments[0]))
    except Exception as error:
        said = f"guest RAM is not guarded: {error!r}"
    if said:
        # Whoever would read it may be gone too.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"rdma-migrate: {' '.join(said.split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Nothing has to be put in order, and whoever has said DONE waits.
    main(sys.argv[1:])
    os._exit(0)
