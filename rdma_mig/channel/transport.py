# SPDX-License-Identifier: Apache-2.0
"""What an engine may ask of whatever its stream runs over: RDMA, or a plain channel of bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.memory.ram import GuestRam
from rdma_mig.wire.control import FinalAck

__all__ = ["AT_SOURCE", "DestinationTransport", "SourceTransport"]

#: Who owns the virtual machine as long as nothing has been handed over.
AT_SOURCE = "the virtual machine is still the source's and goes on running there"


class DestinationTransport(Protocol):
    """The destination's end of a connection."""

    setup_seconds: float
    """Preparing memory, seconds."""

    @property
    def final_ack(self) -> bool:
        """Whether the source waits for `acknowledge`."""
        ...

    @property
    def peer(self) -> str:
        """The source, for messages."""
        ...

    @property
    def at_source(self) -> str:
        """Who has the machine up to the commit point, one clause."""
        ...

    @property
    def handed_over(self) -> str:
        """Who has it behind that point, where there is no return path, one clause."""
        ...

    @property
    def source_lets_go(self) -> bool:
        """Whether a source without return path gives its guest up, so that all is kept here."""
        ...

    @property
    def went_on(self) -> bool:
        """Whether the source went on after it was offered the RAM blocks."""
        ...

    @property
    def end_is_sure(self) -> bool:
        """Whether a stream that ends without a description ends there on purpose."""
        ...

    @property
    def disconnected(self) -> bool:
        """Whether the source has ended the connection."""
        ...

    @property
    def has_return_path(self) -> bool:
        """Whether the source waits for this end's word before it lets go of its guest."""
        ...

    def attach(self, ram: GuestRam) -> None:
        """Say where RAM shall arrive; it must outlive this."""
        ...

    def next_ready_commits(self) -> None:
        """Note, where this end is asked for what follows, that what it asks for next lets go."""
        ...

    def withdraw_keys(self) -> None:
        """Be sure that nobody but this process can change RAM from here on."""
        ...

    def open_return_path(self) -> bool:
        """Do as the stream's OPEN_RETURN_PATH says; False where there can be none."""
        ...

    def pong(self, value: int) -> None:
        """Answer the stream's PING; there must be a return path."""
        ...

    def shut(self, seconds: float) -> None:
        """Tell the source that everything is whole: it lets go of its guest.

        Args:
            seconds: how long the source may take to end the connection when it has heard it.

        Raises:
            MigrationError: it may or may not have heard it.
        """
        ...

    def acknowledge(self, ack: FinalAck) -> None:
        """Tell a source that waits for it whether everything is whole."""
        ...

    def wait_disconnected(self, seconds: float) -> bool:
        """Let the source end the connection; return whether it did.

        Raises:
            MigrationError: it has sent more instead, or says that it has failed.
        """
        ...

    def silence_limited(self, seconds: float) -> AbstractContextManager[None]:
        """Let the source be silent for so long at most, within this block."""
        ...


class SourceTransport(Protocol):
    """The source's end of a connection."""

    setup_seconds: float
    """Preparing memory and agreeing on the blocks, seconds."""

    @property
    def final_ack(self) -> bool:
        """Whether the destination says at the end whether everything is whole and on disk."""
        ...

    @property
    def restores(self) -> bool:
        """Whether a machine may run at the other end afterwards, and not merely be kept there."""
        ...

    @property
    def lists_shared(self) -> bool:
        """Whether blocks are listed that are not sent (x-ignore-shared)."""
        ...

    @property
    def peer(self) -> str:
        """The destination, for messages."""
        ...

    @property
    def has_return_path(self) -> bool:
        """Whether the destination says on a return path how it ended."""
        ...

    @property
    def writes(self) -> int:
        """RDMA writes posted so far."""
        ...

    def send_device_state(
        self,
        file: QEMUFile,
        raw: bytes,
        eof_offset: int,
        before_eof: Callable[[], None] | None = None,
    ) -> str:
        """Send everything behind RAM, and see how far the destination came with it.

        Args:
            file: the stream, after the RAM section.
            raw: sections, the EOF byte, and the description where there is one.
            eof_offset: offset in ``raw`` right behind the EOF byte.
            before_eof: called before the EOF byte is sent, without which nobody can take over.

        Returns:
            what is known by that.

        Raises:
            MigrationError: the destination did not take it.
        """
        ...

    def send_stream_end(self) -> None:
        """Say that nothing follows, where `final_ack` is agreed on."""
        ...

    def wait_final_ack(self) -> FinalAck:
        """Wait for the destination's word, where `final_ack` is agreed on."""
        ...

    def wait_shut(self) -> int:
        """Wait for the last word on the return path: 0 when everything was loaded."""
        ...

    def finish(self) -> str:
        """End the connection well; return what is known by that, empty for nothing.

        Raises:
            MigrationError: the other end has not got everything.
        """
        ...
