# SPDX-License-Identifier: Apache-2.0
"""Everything that rdma-mig raises on purpose, and the exit status each kind ends in.

A message is written for the operator who reads one line of it: what was awaited or done, by or
from whom. The three things that line must not lack are fields of their own, so that nobody has to
parse prose: ``step`` (what the migration was at), ``owner`` (which side can run the virtual
machine after this failure) and ``remedy`` (what to do now, a command where there is one).
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "ExitStatus",
    "HostError",
    "LocalProtocolError",
    "MigrationCancelled",
    "MigrationError",
    "MigrationTimeout",
    "PeerGone",
    "ProtocolError",
    "RemoteProtocolError",
    "SnapshotError",
    "StreamCut",
    "UsageError",
]


class ExitStatus(IntEnum):
    """Exit statuses of ``rdma-migrate``."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    HOST_CANNOT = 3
    PEER_BROKE_PROTOCOL = 4
    TIMED_OUT_OR_CANCELLED = 5


class MigrationError(Exception):
    """A migration, or work on a snapshot, failed.

    Args:
        message: what happened, one line, without a final full stop.
        remedy: what the operator can do about it, one line; a command where there is one.
        owner: who owns the virtual machine now, one clause; empty where that is no question.
        step: what the migration was at, a participle: "receiving device state"; empty outside one.
    """

    exit_status = ExitStatus.FAILED

    def __init__(self, message: str, *, remedy: str = "", owner: str = "", step: str = "") -> None:
        super().__init__(message)
        self.step = step
        self.message = message
        self.remedy = remedy
        self.owner = owner

    def __str__(self) -> str:
        """The one line an operator reads."""
        happened = f"{self.message} (while {self.step})" if self.step else self.message
        return "; ".join(part for part in (happened, self.owner, self.remedy) if part)


class UsageError(MigrationError):
    """An argument cannot be used: a URI that does not parse, options that exclude each other."""

    exit_status = ExitStatus.USAGE


class HostError(MigrationError):
    """This host cannot do it: no verbs device, no permission, no memory to lock, port taken."""

    exit_status = ExitStatus.HOST_CANNOT


class SnapshotError(MigrationError):
    """A snapshot directory cannot be written or read, or is damaged."""


class PeerGone(MigrationError):
    """The peer closed the connection, or its host or process is gone."""


class ProtocolError(MigrationError):
    """The migration protocol was broken, by us (local) or by the peer (remote)."""

    exit_status = ExitStatus.PEER_BROKE_PROTOCOL


class LocalProtocolError(ProtocolError):
    """We were asked to send something that the protocol does not allow here."""

    exit_status = ExitStatus.FAILED


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow here.

    Args:
        at: which byte of what it sent: of the whole stream, or of a piece of it that was given to
            who raises this; None where that is no question.
    """

    def __init__(
        self, message: str, *, remedy: str = "", owner: str = "", at: int | None = None
    ) -> None:
        super().__init__(message, remedy=remedy, owner=owner)
        self.at = at


class StreamCut(RemoteProtocolError, PeerGone):
    """The stream ended in the middle: its source is gone, or a file is not whole.

    Args:
        peer: whose stream.
        at: bytes of it that came.
        awaited: what was to come next.
    """

    # Who was killed broke no protocol.
    exit_status = ExitStatus.FAILED

    def __init__(self, peer: str, at: int, awaited: str, *, remedy: str = "") -> None:
        super().__init__(
            f"{peer} ended the stream at its byte {at}; awaited was {awaited}",
            remedy=remedy,
            at=at,
        )


class MigrationTimeout(MigrationError):
    """A wait reached its limit."""

    exit_status = ExitStatus.TIMED_OUT_OR_CANCELLED


class MigrationCancelled(MigrationError):
    """The migration was cancelled: by ``cancel()``, SIGINT or SIGTERM."""

    exit_status = ExitStatus.TIMED_OUT_OR_CANCELLED
