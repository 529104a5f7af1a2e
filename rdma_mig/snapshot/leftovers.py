# SPDX-License-Identifier: Apache-2.0
"""What runs that did not finish have left beside a snapshot's place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rdma_mig.errors import SnapshotError
from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.manifest import (
    COMMAND,
    CONFIG,
    DESCRIPTION,
    DEVICE_STATE,
    MANIFEST,
    RAM,
    WRITTEN,
)
from rdma_mig.words import printable

__all__ = ["Leftover", "abandoned", "find", "name_incomplete", "parent_lock", "remove"]

_NAME = re.compile(r"(?P<of>.+)\.(?P<kind>partial-[0-9]+|incomplete)(\.[0-9]+)?")
_OURS = frozenset(
    {MANIFEST, CONFIG, DEVICE_STATE, DESCRIPTION, RAM, WRITTEN, f"{WRITTEN}.new", COMMAND}
)


@dataclass(frozen=True, slots=True)
class Leftover:
    """A directory that a run has left, or works on.

    Attributes:
        path: where it is.
        kind: "partial": a run was killed, or is at work; "incomplete": a failure behind the commit
            point, which may be the only copy of a virtual machine.
        in_use: a run works on it.
        disk_bytes: what it takes on disk.
        has_ram: all RAM is on disk: it may be the only copy of a virtual machine, and recover()
            may make a snapshot of it.
    """

    path: Path
    kind: str
    in_use: bool
    disk_bytes: int
    has_ram: bool = False


def find(place: Path) -> list[Leftover]:
    """List what was left.

    Args:
        place: a snapshot directory's name (it need not exist), for what was left beside it; or a
            directory that holds snapshots, for all that was left in it.

    Raises:
        SnapshotError: the directory cannot be read.
    """
    place = Path(os.path.abspath(place))
    of: str | None = place.name
    parent = place.parent
    if place.is_dir() and not (place / MANIFEST).exists():
        parent, of = place, None
    with (
        _fs.failing("list", parent),
        _fs.closing(_fs.open_directory(parent, follow=True)) as directory,
    ):
        found = []
        for name in sorted(os.listdir(directory)):
            match = _NAME.fullmatch(name)
            if match is None or of not in (None, match["of"]):
                continue
            with contextlib.suppress(OSError):
                found.append(_look(directory, parent, name, match["kind"].partition("-")[0]))
    return found


def _look(directory: int, parent: Path, name: str, kind: str) -> Leftover:
    with _fs.closing(_fs.open_directory(name, directory)) as opened:
        size = _disk_bytes(opened)
        has_ram = _has_ram(opened)
    return Leftover(parent / name, kind, not abandoned(directory, name), size, has_ram)


def _has_ram(directory: int) -> bool:
    for name in (WRITTEN, MANIFEST):
        with contextlib.suppress(OSError):
            if os.stat(name, dir_fd=directory, follow_symlinks=False).st_size:
                return True
    return False


def _disk_bytes(directory: int) -> int:
    total = 0
    for _path, _directories, files, fd in os.fwalk(dir_fd=directory):
        for file in files:
            total += os.stat(file, dir_fd=fd, follow_symlinks=False).st_blocks * 512
    return total


def remove(leftover: Leftover) -> None:
    """Remove one, locked meanwhile so that nobody takes it for a run at work, or for one left.

    Raises:
        SnapshotError: a run works on it, it holds what no snapshot does, or it cannot be removed.
    """
    path = leftover.path
    with (
        _fs.failing("remove", path),
        _fs.closing(_fs.open_directory(path.parent, follow=True)) as parent,
        _fs.closing(_fs.open_directory(path.name, parent)) as directory,
    ):
        foreign = sorted(set(os.listdir(directory)) - _OURS)
        if foreign:
            raise SnapshotError(
                f"{printable(path)} holds {printable(foreign[0])}, which is no part of a snapshot",
                remedy="see whose it is, and remove the directory yourself",
            )
        with contextlib.ExitStack() as stack:
            try:
                manifest = stack.enter_context(_fs.closing(_fs.open_file(MANIFEST, directory)))
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                pass  # kept without one: nobody works on it
            except BlockingIOError:
                raise SnapshotError(
                    f"a run works on {printable(path)}", remedy="wait for its end"
                ) from None
            shutil.rmtree(path.name, dir_fd=parent)


@contextlib.contextmanager
def parent_lock(parent: int) -> Iterator[None]:
    """Keep other writers from looking at a partial between its mkdir and its lock.

    Best effort, and for a second at most: NFS locks no directories, and a directory that anyone
    can read anyone can lock.
    """
    for _ in range(100):
        try:
            fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
        else:
            break
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(parent, fcntl.LOCK_UN)


def name_incomplete(parent: int, present: str, of: str) -> str | None:
    """Rename ``present`` to ``OF.incomplete``, with ``.N`` added when that is taken.

    Args:
        parent: descriptor of the directory that both names are in, made durable.
        present: the name it has.
        of: the snapshot's final name.

    Returns:
        The new name; None where it could not be renamed and keeps the one it has.
    """
    named = None
    for attempt in range(1000):
        name = f"{of}.incomplete" + (f".{attempt}" if attempt else "")
        try:
            _fs.rename_noreplace(parent, present, name)
        except FileExistsError:
            continue
        except OSError:
            break
        named = name
        break
    with contextlib.suppress(OSError):
        os.fsync(parent)
    return named


def abandoned(parent: int, name: str) -> bool:
    """Whether nobody works on the directory ``name`` in ``parent`` any more."""
    try:
        with (
            _fs.closing(_fs.open_directory(name, parent)) as directory,
            _fs.closing(_fs.open_file(MANIFEST, directory)) as fd,
        ):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # locked, or not ours to judge
    return True
