# SPDX-License-Identifier: Apache-2.0
"""A file read like bytes, without mapping it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path


class FileBytes:
    """The bytes of a file by slices, as many at a time as are asked for, read when asked for.

    Not a mapping: where page faults are slow (nested emulation), reading is many times faster.
    It goes on reading the same file when that one's name is gone.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._path = path

    def __del__(self) -> None:
        """Close the file; nothing is lost when that is late."""
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def __repr__(self) -> str:
        return f"FileBytes({str(self._path)!r})"

    def __len__(self) -> int:
        """Size of the file, bytes."""
        return os.fstat(self._fd).st_size

    def __getitem__(self, where: slice) -> bytes:
        """The bytes of a slice without a step."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("a slice of a file has no step")
        data = os.pread(self._fd, max(stop - start, 0), start)
        if len(data) < stop - start:
            raise EOFError(f"{self._path} ended at {start + len(data):#x}")
        return data


class JoinedBytes:
    """The bytes of several files, one behind the other."""

    def __init__(self, files: Sequence[FileBytes]) -> None:
        self._files = list(files)

    def __repr__(self) -> str:
        return f"JoinedBytes({self._files!r})"

    def __len__(self) -> int:
        """Size of all files, bytes."""
        return sum(len(file) for file in self._files)

    def __getitem__(self, where: slice) -> bytes:
        """The bytes of a slice without a step."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("a slice of files has no step")
        pieces = []
        base = 0
        for file in self._files:
            low, high = max(start - base, 0), min(stop - base, len(file))
            if low < high:
                pieces.append(file[low:high])
            base += len(file)
        return b"".join(pieces)


#: What guest RAM can be handed over as.
Buffer = bytes | bytearray | memoryview | mmap.mmap | FileBytes | JoinedBytes
