# SPDX-License-Identifier: Apache-2.0
"""Both ends of a migration over a plain channel of bytes: pages travel in the stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from rdma_mig.channel.link import Link, SocketLink
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import (
    LocalProtocolError,
    MigrationError,
    MigrationTimeout,
    PeerGone,
    RemoteProtocolError,
)
from rdma_mig.memory.ram import GuestRam
from rdma_mig.wire.control import FinalAck
from rdma_mig.wire.return_path import Pong, ReturnListener, ReturnMessage, Shut

__all__ = ["PlainIncoming", "PlainOutgoing"]

_STREAM = "the next part of the migration stream"
_PROVED_BY_NOBODY = "that a machine was loaded from it, nothing could prove"


class _Plain:
    """What both ends share.

    Args:
        link: closed with this.
    """

    final_ack = False

    def __init__(self, link: Link) -> None:
        self._link = link
        self.setup_seconds = 0.0

    @property
    def peer(self) -> str:
        """The other end, for messages."""
        return self._link.peer

    def abort(self) -> None:
        """This end has failed: leave nothing half done."""
        self._link.abort()

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._link.close()


class PlainIncoming(_Plain):
    """The destination's end: a byte channel, and a `DestinationTransport`."""

    went_on = True
    end_is_sure = False

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self._ended = False
        self._count = 0
        self._return_path = False

    @property
    def disconnected(self) -> bool:
        """Whether the stream has ended."""
        return self._ended

    @property
    def source_lets_go(self) -> bool:
        """Whether the source may be a QEMU that gives its guest up; a file stays as it is."""
        return self._link.kind != "file"

    @property
    def at_source(self) -> str:
        """Who has the machine up to the commit point."""
        if self._link.kind == "file":
            return f"the stream in {self.peer} is unchanged"
        return (
            "the virtual machine is still the source's: it goes on running there, or is held "
            "stopped if all of the stream had left (QEMU: postmigrate; `cont` there resumes it)"
        )

    @property
    def handed_over(self) -> str:
        """Who has it when all RAM has come."""
        if self._link.kind == "file":
            return self.at_source
        return (
            "the source holds its virtual machine stopped when it has sent everything (QEMU: "
            "postmigrate; `cont` there resumes it), and else goes on running it"
        )

    def attach(self, ram: GuestRam) -> None:
        """RAM arrives in the stream, and who reads that puts it there."""

    def next_ready_commits(self) -> None:
        """A source here lets go when its last byte is on its way, and asks nobody."""

    def withdraw_keys(self) -> None:
        """Nobody else can change RAM at any time."""

    # ---- ByteChannel ----

    def read(self) -> bytes:
        """Wait for the next bytes of the stream; empty when it has ended."""
        data = self._link.read(_STREAM)
        self._ended = not data
        self._count += len(data)
        return data

    def write(self, data: bytes) -> None:
        """A destination's stream runs one way."""
        raise LocalProtocolError("a destination does not write the stream")

    # ---- the return path ----

    @property
    def has_return_path(self) -> bool:
        """Whether the source has opened a return path."""
        return self._return_path

    def open_return_path(self) -> bool:
        """On a socket it needs nothing; elsewhere there can be none."""
        self._return_path = self._link.two_way
        return self._return_path

    def pong(self, value: int) -> None:
        """Answer the stream's PING."""
        self._say(Pong(value))

    def _say(self, message: ReturnMessage) -> None:
        if not self._return_path:
            raise LocalProtocolError("there is no return path")
        self._link.write(message.encode(), "a word on the return path")

    def shut(self, seconds: float) -> None:
        """Tell the source that everything is on disk: it lets go of its guest.

        A source that was cancelled meanwhile closes without reading the word, which resets the
        connection. One that heard it ends the connection in order.
        """
        assert isinstance(self._link, SocketLink)
        if self._link.ended():
            raise PeerGone(f"{self.peer} left before it was told that everything is on disk")
        self._say(Shut(0))
        if not self.wait_disconnected(seconds):
            raise PeerGone(f"{self.peer} was told that all is on disk and does not leave")

    def wait_disconnected(self, seconds: float) -> bool:
        """Wait for the end of the stream, behind its last byte."""
        if self._ended:
            return True
        try:
            with self._link.silence_limited(seconds):
                data = self._link.read("the end of the stream")
        except MigrationTimeout:
            if self._link.limits.total.passed:
                raise
            return False
        if data:
            raise RemoteProtocolError(
                f"{self.peer} sent {len(data)} bytes or more behind the end of the stream, which "
                f"is its byte {self._count}",
                at=self._count,
            )
        self._ended = True
        return True

    def silence_limited(self, seconds: float) -> AbstractContextManager[None]:
        """Let the source be silent for so long at most, within this block."""
        return self._link.silence_limited(seconds)

    def acknowledge(self, ack: FinalAck) -> None:
        """No source waits for it here."""
        raise LocalProtocolError("a final acknowledgement is RDMA's")

    def abort(self) -> None:
        """Tell the source, if it listens, that this end has failed; then end the connection."""
        if self._return_path:
            try:
                with self._link.silence_limited(0.5):
                    self._say(Shut(1))
            except MigrationError:
                pass
        super().abort()


class PlainOutgoing(_Plain):
    """The source's end: a byte channel, and a `SourceTransport`.

    Args:
        link: closed with this.
        return_path: let the destination say on the same socket how it ended.
        ping: value of the PING that the stream carries.

    Raises:
        LocalProtocolError: a return path where there can be none.
    """

    writes = 0
    lists_shared = True

    def __init__(self, link: Link, *, return_path: bool, ping: int) -> None:
        super().__init__(link)
        if return_path and not link.two_way:
            raise LocalProtocolError(f"{link.peer} has no way back for a return path")
        self._listener = ReturnListener(ping) if return_path else None

    @property
    def restores(self) -> bool:
        """Whether a machine may run at the other end now; who knows, but for a file."""
        return self._link.kind != "file"

    @property
    def has_return_path(self) -> bool:
        """Whether the destination says how it ended."""
        return self._listener is not None

    # ---- ByteChannel ----

    def write(self, data: bytes) -> None:
        """Send stream bytes."""
        self._link.write(data, "the migration stream")

    def read(self) -> bytes:
        """A source's stream runs one way."""
        raise LocalProtocolError("a source does not read its stream")

    # ---- the end ----

    def send_device_state(
        self,
        file: QEMUFile,
        raw: bytes,
        eof_offset: int,
        before_eof: Callable[[], None] | None = None,
    ) -> str:
        """Send everything behind RAM; nobody asks for it, so that nothing is known by that."""
        if before_eof is not None:
            before_eof()
        file.put(raw)
        file.flush()
        return f"{self.peer} was sent everything; {_PROVED_BY_NOBODY}"

    def wait_shut(self) -> int:
        """Wait for the destination's last word: 0 when it has loaded everything."""
        if self._listener is None:
            raise LocalProtocolError("there is no return path")
        while (status := self._listener.status(self.peer)) is None:
            data = self._link.read("the destination's word on the return path")
            if not data:
                raise PeerGone(
                    f"{self.peer} left without a word on the return path",
                    remedy="its own messages say what it could not load; start it with the "
                    "machine, memory and devices of the source",
                )
            self._listener.feed(data)
        return status

    def send_stream_end(self) -> None:
        """No destination waits for it here."""
        raise LocalProtocolError("a mark at the end of the stream is RDMA's")

    def wait_final_ack(self) -> FinalAck:
        """No destination sends one here."""
        raise LocalProtocolError("a final acknowledgement is RDMA's")

    def finish(self) -> str:
        """End the stream; a command has to end well, a file has to be on disk."""
        known = self._link.finish()
        self._link.close()
        return known and f"{known}; {_PROVED_BY_NOBODY}"
