# SPDX-License-Identifier: Apache-2.0
"""Making a snapshot of what a run has left, where all of it had arrived; and what that needs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from rdma_mig.errors import LocalProtocolError, SnapshotError
from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.manifest import (
    DESCRIPTION,
    DEVICE_STATE,
    MANIFEST,
    MAX_DEVICE_STATE,
    MAX_MANIFEST,
    RAM,
    WRITTEN,
    FileRecord,
    Manifest,
)
from rdma_mig.snapshot.reader import Snapshot
from rdma_mig.wire.description import DeviceStateScanner
from rdma_mig.words import printable

__all__ = ["LEFT", "complete", "note_written", "recover", "state_is_whole"]

LEFT = re.compile(r"(?P<of>.+)\.(partial-[0-9]+|incomplete)(\.[0-9]+)?")
"""The name of what a run has left; ``of`` is DIR's."""

_RAM_IS_LOST = (
    "the source has the virtual machine: `cont` there resumes it (QEMU: postmigrate), if it does "
    "not run already"
)


def note_written(directory: int, manifest: Manifest) -> None:
    """Say in a partial that all RAM is on disk.

    Args:
        directory: its descriptor.
        manifest: all but device state, of which anything may be said.

    Raises:
        OSError: it could not be written; nothing is said then.
    """
    # Under another name first: it is there whole or not at all.
    new = f"{WRITTEN}.new"
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with _fs.closing(os.open(new, flags, 0o600, dir_fd=directory)) as fd:
            _fs.write_all(fd, manifest.encode(), 0)
            os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=directory)
        raise
    os.rename(new, WRITTEN, src_dir_fd=directory, dst_dir_fd=directory)
    _fs.fsync_dir(RAM, directory)
    os.fsync(directory)


def recover(left: Path) -> Path:
    """Give a directory that a run has left its final name, when the whole machine is in it.

    That is so when RAM was on disk and all device state had arrived. Everything is read and
    compared with its digests before.

    Args:
        left: ``DIR.partial-PID`` or ``DIR.incomplete``.

    Returns:
        DIR.

    Raises:
        SnapshotError: something is missing, which the message names; a run works on it; DIR exists.
            Nothing of what was left is lost.
    """
    left = Path(os.path.abspath(left))
    shown = printable(left)
    match = LEFT.fullmatch(left.name)
    if match is None:
        raise SnapshotError(
            f"{shown} is not what a run has left",
            remedy="name a DIR.partial-PID or DIR.incomplete; rdma-migrate clean DIR lists them",
        )
    with contextlib.ExitStack() as stack:
        with _fs.failing("open", left):
            parent = stack.enter_context(_fs.closing(_fs.open_directory(left.parent, follow=True)))
            directory = stack.enter_context(_fs.closing(_fs.open_directory(left.name, parent)))
            # Made again where it was removed, since it was empty.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            lock = stack.enter_context(
                _fs.closing(os.open(MANIFEST, flags, 0o600, dir_fd=directory))
            )
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SnapshotError(f"a run works on {shown}", remedy="wait for its end") from None
        if not os.fstat(lock).st_size:
            complete(left, directory, lock)
        with _fs.failing("clean up", left), contextlib.suppress(FileNotFoundError):
            os.unlink(WRITTEN, dir_fd=directory)
        with Snapshot.open(left) as snapshot:
            snapshot.verify()
        with _fs.failing("make durable", left):
            _fs.fsync_dir(RAM, directory)
            os.fsync(directory)
        final = left.parent / match["of"]
        try:
            _fs.rename_noreplace(parent, left.name, final.name)
        except FileExistsError:
            raise SnapshotError(
                f"{printable(final)} exists already; {shown} is whole",
                remedy="move one of them away",
            ) from None
        except OSError as error:
            raise _fs.failure(error, f"rename {left.name} to", final) from error
        with _fs.failing("make durable the new name", final):
            os.fsync(parent)
    return final


def _device_state(left: Path, directory: int) -> tuple[bytes, DeviceStateScanner]:
    with (
        _fs.failing("read", left / DEVICE_STATE),
        open(_fs.open_file(DEVICE_STATE, directory), "rb") as file,
    ):
        state = file.read(MAX_DEVICE_STATE)
        os.fsync(file.fileno())
    scanner = DeviceStateScanner()
    scanner.feed(state)
    return state, scanner


def _end(scanner: DeviceStateScanner) -> int | None:
    try:
        return scanner.eof_offset
    except LocalProtocolError:
        return None


def state_is_whole(left: Path, directory: int) -> bool:
    """Whether what there is of the device state ends where a machine's does.

    Args:
        left: the directory's name, for messages.
        directory: its descriptor.

    Raises:
        SnapshotError: it cannot be read.
    """
    return _end(_device_state(left, directory)[1]) is not None


def complete(left: Path, directory: int, lock: int) -> None:
    """Write the manifest that a run did not come to write.

    Args:
        left: the directory's name, for messages.
        directory: its descriptor.
        lock: descriptor of its manifest, locked.

    Raises:
        SnapshotError: something is missing, or it cannot be written; the manifest is empty then.
    """
    try:
        _complete(left, directory, lock)
    except SnapshotError:
        # An empty one says no more than none, and this can be tried again.
        os.ftruncate(lock, 0)
        raise


def _complete(left: Path, directory: int, lock: int) -> None:
    shown = printable(left)
    try:
        with open(_fs.open_file(WRITTEN, directory), "rb") as file:
            written = Manifest.decode(file.read(MAX_MANIFEST), printable(left / WRITTEN))
    except FileNotFoundError:
        raise SnapshotError(
            f"{shown} lacks RAM, which had not been written to disk when the run ended",
            owner=_RAM_IS_LOST,
            remedy="migrate again; with --sync before RAM is on disk before the source lets go",
        ) from None
    except OSError as error:
        raise _fs.failure(error, "read", left / WRITTEN) from error
    state, scanner = _device_state(left, directory)
    eof = _end(scanner)
    if eof is None:
        raise SnapshotError(
            f"{shown} has all RAM and lacks device state: {len(state)} bytes arrived, and they do "
            "not end where a machine's state does",
            owner=_RAM_IS_LOST,
            remedy="migrate again",
        )
    description = None
    if scanner.complete:
        raw = scanner.description
        description = FileRecord(len(raw), hashlib.sha256(raw).hexdigest())
    with _fs.failing("write", left):
        if description is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(DESCRIPTION, dir_fd=directory)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            with _fs.closing(os.open(DESCRIPTION, flags, 0o600, dir_fd=directory)) as fd:
                _fs.write_all(fd, raw, 0)
                os.ftruncate(fd, len(raw))
                os.fsync(fd)
        manifest = replace(
            written,
            device_state=FileRecord(len(state), hashlib.sha256(state).hexdigest()),
            eof_offset=eof,
            description=description,
        ).encode()
        _fs.write_all(lock, manifest, 0)
        os.ftruncate(lock, len(manifest))
        os.fsync(lock)
