# SPDX-License-Identifier: Apache-2.0
"""A stream in a file (``file:PATH``), which has its name when it is whole."""

from __future__ import annotations

import contextlib
import os
import stat

from rdma_mig.channel.link import DescriptorLink
from rdma_mig.errors import HostError
from rdma_mig.waits import Cancel, TransportLimits
from rdma_mig.wire.uri import FileAddress

__all__ = ["FileReader", "FileWriter"]


class FileReader(DescriptorLink):
    """Reads a stream from a file.

    Args:
        address: the file, and where in it the stream begins.
        cancel, limits: as for `Link`.

    Raises:
        HostError: it cannot be opened.
    """

    kind = "file"

    def __init__(self, address: FileAddress, cancel: Cancel, limits: TransportLimits) -> None:
        try:
            fd = os.open(address.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(f"{address.path} cannot be read: {error.strerror}") from None
        super().__init__(fd, cancel, limits, address.path)
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                raise HostError(
                    f"{address.path} is a directory, and no stream",
                    remedy="a snapshot is sent by outgoing",
                )
            if address.offset:
                os.lseek(fd, address.offset, os.SEEK_SET)
        except OSError as error:
            self.close()
            raise HostError(f"{address.path} has no offset: {error.strerror}") from None
        except HostError:
            self.close()
            raise


class FileWriter(DescriptorLink):
    """Writes a stream into a file.

    From offset 0 on it is written beside, under the name with ``.partial-PID``, and takes its name
    when it is on disk. From another one on, and what is no regular file, is written in place.

    Args:
        address: the file, and where in it the stream shall begin.
        cancel, limits: as for `Link`.

    Raises:
        HostError: it cannot be written.
    """

    kind = "file"

    def __init__(self, address: FileAddress, cancel: Cancel, limits: TransportLimits) -> None:
        self._path = address.path
        self._partial = ""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            in_place = address.offset or not _regular_or_none(address.path)
            if not in_place:
                self._partial = f"{address.path}.partial-{os.getpid()}"
                flags |= os.O_EXCL
            fd = self._create(flags) if self._partial else os.open(address.path, flags, 0o600)
        except OSError as error:
            raise HostError(f"{address.path} cannot be written: {error.strerror}") from None
        super().__init__(fd, cancel, limits, address.path)
        try:
            if address.offset:
                os.lseek(fd, address.offset, os.SEEK_SET)
        except OSError as error:
            self.close()
            raise HostError(f"{address.path} has no offset: {error.strerror}") from None

    def _create(self, flags: int) -> int:
        """Make the file that is written beside: a new one, of nobody else's."""
        try:
            return os.open(self._partial, flags, 0o600)
        except FileExistsError:
            # Of a run that was killed and had the same number.
            os.unlink(self._partial)
            return os.open(self._partial, flags, 0o600)

    def finish(self) -> str:
        """Put it on disk, and give it its name."""
        try:
            with contextlib.suppress(OSError):  # a pipe or a device has nothing to sync
                os.fsync(self._fd)
            if self._partial:
                os.rename(self._partial, self._path)
                self._partial = ""
                directory = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        except OSError as error:
            raise HostError(f"{self._path} cannot be written: {error.strerror}") from None
        return f"the stream is on disk in {self._path}"

    def close(self) -> None:
        """Close it; remove what has not become the whole file. Idempotent."""
        super().close()
        partial, self._partial = self._partial, ""
        if partial:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def _regular_or_none(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True
