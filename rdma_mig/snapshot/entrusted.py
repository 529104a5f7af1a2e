# SPDX-License-Identifier: Apache-2.0
"""A snapshot that is handed from the process that writes it to one that may have to finish it.

Descriptors go over a Unix socket (SCM_RIGHTS): RAM stays where it is, and the lock on the manifest
belongs to both then. What is said with them lies in a file in memory, which has no limit of size as
a message has.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final, Self

from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.manifest import MAX_MANIFEST, Manifest

__all__ = ["DONE", "READY", "TAKEN", "Entrusted"]

READY: Final = b"R"
"""Said by who can take something."""
TAKEN: Final = b"T"
"""Said by who has taken it."""
DONE: Final = b"D"
"""Said by who handed it over, and has ended in order: nothing is to be finished."""

# A kernel passes 253 of them at once.
_BATCH: Final = 250
_COUNT: Final = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Entrusted:
    """What it takes to finish a snapshot in its writer's place.

    Attributes:
        manifest: all of it but what is known of RAM when that has been written, and device state.
        parent: descriptor of the directory that the partial is in.
        directory: of the partial.
        lock: of its manifest, which is locked.
        memories: of the memory of each RAM block, in the manifest's order.
    """

    manifest: Manifest
    parent: int
    directory: int
    lock: int
    memories: tuple[int, ...]

    def send(self, channel: socket.socket) -> None:
        """Hand it over; the descriptors stay open here.

        Raises:
            OSError: it could not be sent, which takes as long as the socket's limit at most.
        """
        with _fs.closing(os.memfd_create("entrusted", os.MFD_CLOEXEC)) as facts:
            _fs.write_all(facts, self.manifest.encode(), 0)
            fds = [facts, self.parent, self.directory, self.lock, *self.memories]
            channel.sendall(_COUNT.pack(len(fds)))
            for start in range(0, len(fds), _BATCH):
                socket.send_fds(channel, [b"\0"], fds[start : start + _BATCH])

    @classmethod
    def receive(cls, channel: socket.socket) -> Self | None:
        """Wait for what the other end sends; None when it ends the connection instead.

        Its descriptors are the caller's, for as long as its process lives.

        Raises:
            OSError: not all of it could be received; this process has too few descriptors.
            SnapshotError: the manifest cannot be read.
        """
        count = b""
        while len(count) < _COUNT.size:
            if not (more := channel.recv(_COUNT.size - len(count))):
                return None
            count += more
        (total,) = _COUNT.unpack(count)
        fds: list[int] = []
        while len(fds) < total:
            more, some, _, _ = socket.recv_fds(channel, 1, _BATCH)
            if not more:
                return None
            if not some:
                raise OSError("descriptors were lost on their way")
            fds += some
        facts, parent, directory, lock, *memories = fds
        with contextlib.closing(open(facts, "rb")) as file:
            file.seek(0)
            manifest = Manifest.decode(file.read(MAX_MANIFEST), "what was handed over")
        return cls(manifest, parent, directory, lock, tuple(memories))
