# SPDX-License-Identifier: Apache-2.0
"""Where snapshots go: which file system that is, and one on a block device where there is none.

A lab's files lie in memory (tmpfs), where making room allocates pages and writing is a copy: what a
disk costs is not seen there, neither dd's nor ours.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
_SECONDS = 120.0
# A snapshot that is sent, one that arrives or the copy that dd makes, and as much again free beside
# that: a disk that is nearly full is a case of its own (snapshot/room.py). And what ext4 needs.
_COPIES = 3
_BESIDE = 512 * MIB


def filesystem(directory: Path) -> str:
    """Return the type of the file system that a directory is in."""
    return subprocess.run(
        ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", directory],
        check=True, capture_output=True, text=True, timeout=_SECONDS,
    ).stdout.strip()  # fmt: skip


def image_size(ram: int) -> int:
    """Return the bytes of an image that the snapshots of a guest with so much RAM fit into."""
    return _COPIES * (ram + ram // 16) + _BESIDE


@contextlib.contextmanager
def on_image(directory: Path, size: int) -> Iterator[None]:
    """Mount a new ext4 in an image of so many bytes, which lies in memory, on a directory.

    Needs root, and a kernel that has ext4 and loop devices. The image has all its pages from the
    start, so that whoever writes to a block for the first time does not pay for them.
    """
    with tempfile.NamedTemporaryFile(prefix="rdma-mig-disk-", dir="/dev/shm") as image:
        os.posix_fallocate(image.fileno(), 0, size)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image.name)
        _run("mount", "-t", "ext4", "-o", "loop,noatime", image.name, str(directory))
        try:
            yield
        finally:
            _run("umount", str(directory))


def _run(program: str, *arguments: str) -> None:
    # Administrators' programs are not on everybody's path.
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    subprocess.run([path or program, *arguments], check=True, timeout=_SECONDS)
