# SPDX-License-Identifier: Apache-2.0
"""What the snapshot rooms need of the file system, and how its failures are told."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

from rdma_mig import _pages
from rdma_mig.errors import SnapshotError
from rdma_mig.words import printable

__all__ = [
    "checked",
    "closing",
    "failing",
    "failure",
    "fsync_dir",
    "human",
    "mount_point",
    "open_directory",
    "open_file",
    "rename_noreplace",
    "set_aside",
    "write_all",
]

_RENAME_NOREPLACE = 1


def human(size: int) -> str:
    """A size for people: KiB below 1 MiB, GiB from 1 GiB."""
    if size < 1 << 20:
        return f"{-(-size // 1024)} KiB"
    return f"{size / (1 << 20):.1f} MiB" if size < 1 << 30 else f"{size / (1 << 30):.2f} GiB"


def mount_point(path: Path) -> Path:
    """Where the file system that holds ``path`` is mounted."""
    here = path
    with contextlib.suppress(OSError):
        here = here.resolve()
        while not here.is_mount() and here != here.parent:
            here = here.parent
    return here


def _space(path: Path) -> str:
    mount = mount_point(path)
    try:
        fs = os.statvfs(mount)
    except OSError:
        return f"the file system mounted at {printable(mount)}"
    inodes = f" and {fs.f_favail} free inodes" if fs.f_files and fs.f_favail < 64 else ""
    return (
        f"the file system mounted at {printable(mount)} "
        f"({human(fs.f_bavail * fs.f_frsize)} free{inodes})"
    )


def failure(error: OSError, what: str, path: Path) -> SnapshotError:
    """An OSError as the one line an operator needs.

    Args:
        error: what the system said.
        what: what was being done to ``path``: "write", "open".
        path: the file or directory.
    """
    code = error.errno or 0
    message = f"cannot {what} {printable(path)}: {os.strerror(code) if code else error}"
    match code:
        case errno.ENOSPC:
            remedy = f"free space on {_space(path.parent)}, or choose a directory elsewhere"
        case errno.EDQUOT:
            remedy = f"raise the quota on {_space(path.parent)}, or choose a directory elsewhere"
        case errno.EFBIG if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            remedy = "raise the limit of file sizes (ulimit -f unlimited)"
        case errno.EFBIG:
            remedy = f"{_space(path.parent)} cannot hold a file that large: choose another"
        case errno.EACCES | errno.EPERM:
            remedy = f"give uid {os.geteuid()} access to it, or run as its owner"
        case errno.EROFS:
            remedy = "the file system is mounted read-only: choose another, or remount it rw"
        case errno.ENOENT if what.startswith("create"):
            remedy = f"create its parent first: mkdir -p {printable(path.parent)}"
        case errno.ENOENT:
            remedy = "check the path"
        case errno.ELOOP:
            remedy = "it is a symbolic link, which is not followed: put the real file there"
        case errno.ENOTDIR:
            remedy = "a part of the path is not a directory: check the path"
        case errno.ENAMETOOLONG:
            remedy = "choose a shorter name"
        case errno.EMFILE:
            remedy = "raise the limit of open files (ulimit -n)"
        case errno.EIO | errno.ESTALE | errno.ENXIO:
            remedy = "check the disk (dmesg) or the file server"
        case _:
            remedy = "choose another directory, or another file system"
    return SnapshotError(message, remedy=remedy)


@contextlib.contextmanager
def failing(what: str, path: Path) -> Iterator[None]:
    """Turn an OSError from within into a SnapshotError about ``path``."""
    try:
        yield
    except OSError as error:
        raise failure(error, what, path) from error


def open_directory(name: str | Path, dir_fd: int | None = None, *, follow: bool = False) -> int:
    """A descriptor of a directory; OSError, ``ENOTDIR`` or ``ELOOP`` for a symbolic link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return os.open(name, flags if follow else flags | os.O_NOFOLLOW, dir_fd=dir_fd)


def open_file(name: str, dir_fd: int) -> int:
    """A descriptor for reading a regular file in ``dir_fd``; links and devices are refused."""
    # O_NONBLOCK: opening a FIFO that someone planted must not wait for its writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def checked(result: int) -> int:
    """The result of a `_pages` function; a negative errno becomes OSError."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of the data at ``offset``."""
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)


def set_aside(fd: int, size: int) -> None:
    """Reserve disk space for a file's first ``size`` bytes, its length unchanged."""
    if size > 0:
        checked(_pages.reserve_space(fd, 0, size))


def fsync_dir(name: str, dir_fd: int) -> None:
    """Make the names in a directory durable."""
    fd = open_directory(name, dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _renameat2(dir_fd: int, old: str, new: str, flags: int) -> int:
    """0 or an errno; ``ENOSYS`` where the C library has no renameat2."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return errno.ENOSYS
    done = call(dir_fd, os.fsencode(old), dir_fd, os.fsencode(new), ctypes.c_uint(flags))
    return 0 if done == 0 else ctypes.get_errno()


def rename_noreplace(dir_fd: int, old: str, new: str) -> None:
    """Rename a directory within ``dir_fd``; FileExistsError when the new name is taken.

    Where file system or kernel know no RENAME_NOREPLACE (NFS, some FUSE), the new name is claimed
    by an empty directory first, which a rename may replace, and only while it is empty. A crash
    between these two calls leaves that empty directory; nothing is ever overwritten.
    """
    code = _renameat2(dir_fd, old, new, _RENAME_NOREPLACE)
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        os.mkdir(new, 0o700, dir_fd=dir_fd)
        try:
            os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.rmdir(new, dir_fd=dir_fd)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
            raise
    elif code:
        raise OSError(code, os.strerror(code))
