# SPDX-License-Identifier: Apache-2.0
"""The byte channel that a migration stream runs over, with or without RAM hooks.

The name and the idea are those of migration.h: the engine writes or reads a stream, and a
transport that can move pages by itself hangs its hooks on the file.
"""

from __future__ import annotations

from typing import Protocol

from rdma_mig._hooks import PageTaker
from rdma_mig.channel.counters import RamCounters
from rdma_mig.errors import LocalProtocolError, MigrationError
from rdma_mig.memory.bitmap import DirtyBitmap

__all__ = ["ByteChannel", "BytesSent", "QEMUFile", "RamControlHooks"]

# A flush makes at least one message, so bytes are collected up to what QEMU itself sends at once.
_BUFFER_SIZE = 32768


class ByteChannel(Protocol):
    """Moves stream bytes. Every wait in it has a limit of its own."""

    def write(self, data: bytes) -> None:
        """Send all of ``data``; where it is cut has no meaning to the receiver."""
        ...

    def read(self) -> bytes:
        """Wait for the next bytes of the stream, at least one; empty at its end."""
        ...

    def close(self) -> None:
        """Close it. Idempotent."""
        ...


class BytesSent(Protocol):
    """The header's ``int *bytes_sent``: anything with a ``value``, such as ctypes.c_int."""

    value: int


class RamControlHooks(Protocol):
    """What a transport does for RAM (docs/protocol.md, RAM phases). Failures raise."""

    def before_iterate(self, file: QEMUFile, flags: int) -> None:
        """A RAM phase begins."""
        ...

    def after_iterate(self, file: QEMUFile, flags: int) -> None:
        """A RAM phase ends: returns when every page of it has been sent."""
        ...

    def load_hook(self, file: QEMUFile, flags: int, data: object) -> None:
        """The stream showed RAM_SAVE_FLAG_HOOK, or listed a block."""
        ...

    def save_page(self, block_offset: int, offset: int, size: int) -> None:
        """Take one page; it is sent later, at the end of the phase at the latest."""
        ...

    def save_pages(self, block_offset: int, dirty: DirtyBitmap | None) -> int:
        """Take every dirty page of a block, or all; return the bytes taken."""
        ...


class QEMUFile:
    """A migration stream, written by a source or read by a destination.

    An error sticks: the call that met it raises it, and so does every later one, since a stream
    with a gap is worth nothing.

    Args:
        channel: carries the bytes; closed with the file.
        hooks: of the transport, or None where pages go through the stream.
    """

    def __init__(self, channel: ByteChannel, hooks: RamControlHooks | None = None) -> None:
        self.channel = channel
        self.hooks = hooks
        self.position = 0
        """Bytes of the stream so far, and of the pages that a transport wrote beside it."""
        self.counters = RamCounters()
        """What became of the guest's pages."""
        self.page_taker: PageTaker | None = None
        """Takes pages without Python, between the hooks' before_iterate and after_iterate, where
        the transport can; None for offer_page(), and once there is an error."""
        self._buffer = bytearray()
        self._error: MigrationError | None = None

    @property
    def error(self) -> MigrationError | None:
        """The first error, if there was one."""
        return self._error

    def fail(self, error: MigrationError) -> None:
        """Note an error; the first one counts."""
        if self._error is None:
            self._error = error
        self.page_taker = None

    def failed(self, error: Exception) -> MigrationError:
        """Make what a hook has met the file's error, and one of our family; return that."""
        if not isinstance(error, MigrationError):
            error = LocalProtocolError(str(error))
        self.fail(error)
        return error

    def offer_page(self, block_offset: int, offset: int, size: int) -> bool:
        """Offer a page to the hooks; return whether they took it. Raises what they raise."""
        self.check()
        if self.hooks is None:
            return False
        try:
            self.hooks.save_page(block_offset, offset, size)
        except (MigrationError, ValueError) as error:
            raise self.failed(error) from error
        return True

    def check(self) -> None:
        """Raise the error that the file is in, if it is in one."""
        if self._error is not None:
            raise self._error

    def account(self, size: int, *, zero: bool) -> None:
        """Count a run of pages that a transport issues; data advances the position, zeros do not.

        Args:
            size: bytes, whole pages of 4096.
            zero: they are announced as zero, and not written.
        """
        self.counters.issued(size, zero=zero)
        if not zero:
            self.position += size

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes to the stream."""
        self.check()
        self._buffer += data
        self.position += len(data)
        if len(self._buffer) >= _BUFFER_SIZE:
            self.flush()

    def flush(self) -> None:
        """Send what has collected; returns when it has left."""
        self.check()
        if not self._buffer:
            return
        data = bytes(self._buffer)
        self._buffer.clear()
        try:
            self.channel.write(data)
        except MigrationError as error:
            self.fail(error)
            raise

    def get(self) -> bytes:
        """Wait for the next bytes; empty at the end of the stream."""
        self.check()
        if self._buffer:
            raise LocalProtocolError("a file that is being written cannot be read")
        try:
            data = self.channel.read()
        except MigrationError as error:
            self.fail(error)
            raise
        self.position += len(data)
        return data

    def close(self) -> None:
        """Close the channel. What was not flushed is lost."""
        self.page_taker = None
        self.channel.close()
