# SPDX-License-Identifier: Apache-2.0
"""Making sure that the disk holds a snapshot, before anything depends on that."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from rdma_mig.errors import SnapshotError
from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.ram import (
    Look,
    Room,
    Stop,
    clear_block,
    create_block,
    data_bytes,
    digest_size,
    reserve_block,
)
from rdma_mig.words import printable

__all__ = ["make_room"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS)


def make_room(
    path: Path,
    ram: int,
    blocks: Sequence[tuple[RamBlock, GuestMemory]],
    others: Sequence[tuple[int, int]],
    should_stop: Stop,
) -> Room:
    """Create the files of RAM, and set blocks of the file system aside for all that follows.

    Where every page of RAM was looked at, that is what its pages that are not zero need. Looking
    takes its time, in which the guest stands still: where there is room it may be more, until the
    snapshot is written. A file system that cannot reserve is only asked how much is free now.

    Args:
        path: the snapshot's, for messages.
        ram: descriptor of the directory of RAM, which is empty.
        blocks: in stream order, each with its memory.
        others: descriptors of further files, and the bytes to keep free for each.
        should_stop: asked every MiB of data; true ends it with `MigrationCancelled`.

    Raises:
        SnapshotError: there is no room, or the files cannot be created.
    """
    with _fs.failing("create", path):
        before = os.fstatvfs(ram)
        for index, (block, _) in enumerate(blocks):
            create_block(ram, index, block)
    look = Look.NONE if _is_roomy(ram, before, blocks) else Look.GLANCE
    try:
        try:
            return _set_aside(ram, blocks, others, should_stop, look)
        except OSError as error:
            if error.errno not in _FULL:
                raise
        for index, (block, _) in enumerate(blocks):
            clear_block(ram, index, block)
        return _set_aside(ram, blocks, others, should_stop, Look.EVERY_PAGE)
    except OSError as error:
        code = error.errno
        if code not in _FULL and code not in _CANNOT_RESERVE:
            raise _fs.failure(error, "set space aside for", path) from error
        total = sum(data_bytes(block, memory, should_stop) for block, memory in blocks)
        need = total + sum(digest_size(block) for block, _ in blocks)
        need += sum(size for _, size in others)
        free = before.f_bavail * before.f_frsize
        # A file system that counts no blocks at all (ramfs) is not a full one.
        if code in _CANNOT_RESERVE and (need <= free or not before.f_blocks):
            return Room(total, exact=True)
        raise _no_space(path, code, need, free) from error


def _is_roomy(
    ram: int, free: os.statvfs_result, blocks: Sequence[tuple[RamBlock, GuestMemory]]
) -> bool:
    """Whether space for all RAM costs little, and leaves as much again to whoever else needs some.

    It costs little on a block device: blocks are marked. Where files lie in memory, each page is
    allocated and cleared.
    """
    on_a_device = os.major(os.fstat(ram).st_dev) != 0
    whole = sum(block.length for block, _ in blocks)
    return on_a_device and 2 * whole <= free.f_bavail * free.f_frsize


def _set_aside(
    ram: int,
    blocks: Sequence[tuple[RamBlock, GuestMemory]],
    others: Sequence[tuple[int, int]],
    should_stop: Stop,
    look: Look,
) -> Room:
    rooms = [
        reserve_block(ram, index, block, memory, should_stop, look=look)
        for index, (block, memory) in enumerate(blocks)
    ]
    for fd, size in others:
        _fs.set_aside(fd, size)
    return Room(
        sum(room.size for room in rooms),
        exact=all(room.exact for room in rooms),
        whole=look is Look.NONE,
    )


def _no_space(path: Path, code: int | None, need: int, free: int) -> SnapshotError:
    mount = printable(_fs.mount_point(path.parent))
    why = "the quota is used up" if code == errno.EDQUOT else f"{_fs.human(free)} are free"
    return SnapshotError(
        f"{printable(path)} needs {_fs.human(need)} for RAM and device state on the "
        f"file system mounted at {mount}, and {why}",
        remedy="free space there, or choose a directory elsewhere",
    )
