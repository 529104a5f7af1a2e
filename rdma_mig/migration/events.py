# SPDX-License-Identifier: Apache-2.0
"""What a migration tells whoever follows it. Each event is a line of ``--json`` output."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rdma_mig.verbs.route import Route

__all__ = [
    "Completed",
    "Connected",
    "GuestState",
    "Listening",
    "Migrated",
    "MigrationEvent",
    "Progress",
    "QemuProgress",
    "Recorded",
    "Spawned",
    "Warned",
]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MigrationEvent:
    """Base of all events; ``event`` is its name in JSON."""

    event: ClassVar[str] = ""

    def as_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return {"event": self.event, **asdict(self)}

    def text(self) -> str:
        """Return what it says to people; empty where whoever shows it finds the words."""
        return ""


@dataclass(frozen=True, slots=True)
class Listening(MigrationEvent):
    """A source can connect now; ``uri`` says where."""

    event: ClassVar[str] = "listening"
    uri: str


@dataclass(frozen=True, slots=True)
class Connected(MigrationEvent):
    """The connection is up: with whom, over which device, with which registration.

    Attributes:
        peer, local: HOST:PORT of the other end and of this one.
        device, port: this end's verbs device, and its port from 1; None but over RDMA.
        transport: "RoCE v2", "RoCE v1", "InfiniBand" or "iWARP"; else the scheme of the URI.
        gid_index, gid: this end's GID; None where the transport needs none (iWARP).
        mtu: bytes of RAM that one packet carries at most; None on iWARP, where TCP decides, and
            without RDMA.
        pin_all: both ends pin all RAM at the start.
        connections: over how many RAM is written; 1 without RDMA.
    """

    event: ClassVar[str] = "connected"
    peer: str
    local: str
    device: str | None
    port: int | None
    transport: str
    gid_index: int | None
    gid: str | None
    mtu: int | None
    pin_all: bool
    connections: int

    @classmethod
    def over(cls, route: Route, *, pin_all: bool, connections: int) -> Connected:
        """Tell of a connection that runs there."""
        return cls(pin_all=pin_all, connections=connections, **asdict(route))

    def route(self) -> str:
        """Return where the connection runs, in words."""
        if self.device is None:
            return f"{self.local or 'this process'} to {self.peer} over {self.transport}"
        words = f"{self.local} to {self.peer} over {self.device} port {self.port}, {self.transport}"
        if self.gid is not None:
            words += f", GID {self.gid_index} ({self.gid})"
        return f"{words}, MTU {self.mtu}" if self.mtu else words


@dataclass(frozen=True, slots=True)
class Progress(MigrationEvent):
    """Something goes on.

    Attributes:
        phase: "load", "setup", "round", "transfer", "device-state", "write".
        done: bytes (or, in phase "round", the number of the round).
        total: of the same unit; 0 where it is not known beforehand.
    """

    event: ClassVar[str] = "progress"
    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Warned(MigrationEvent):
    """Something that the operator should know, and that stops nothing."""

    event: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True)
class Completed(MigrationEvent):
    """The migration is over, and what it took.

    Attributes:
        bytes: RAM bytes that were moved; at a destination the size of the guest's RAM, since
            nobody there sees how often a page was written.
        pages: the same in pages of 4 KiB.
        nonzero_bytes: RAM bytes in pages that are not zero (incoming), or loaded (outgoing).
        device_state_bytes: bytes of the stream behind the RAM section.
        rounds: RAM phases after setup, the last one included.
        writes: RDMA writes posted; 0 at a destination, which does not see them.
        normal_pages: pages of 4 KiB written; 0 at a destination.
        duplicate_pages: pages of 4 KiB that were announced as zero instead; 0 at a destination.
        setup_seconds: populating and registering memory, and agreeing on the blocks.
        transfer_seconds: from there to the last byte of the stream.
        writing_seconds: setting disk space aside and writing the snapshot (incoming), or loading
            it (outgoing).
        bytes_per_second: bytes / transfer_seconds.
        path: the snapshot's directory.
        peer: the other end.
        confirmed: how the end is known (see docs/protocol.md, end of stream).
    """

    event: ClassVar[str] = "completed"
    bytes: int
    pages: int
    nonzero_bytes: int
    device_state_bytes: int
    rounds: int
    writes: int
    normal_pages: int
    duplicate_pages: int
    setup_seconds: float
    transfer_seconds: float
    writing_seconds: float
    bytes_per_second: float
    path: str
    peer: str
    confirmed: str


@dataclass(frozen=True, slots=True)
class QemuProgress(MigrationEvent):
    """How a QEMU says that its migration goes (query-migrate).

    Attributes:
        end: "source" or "destination".
        status: of its migration: "setup", "active", "device", "completed", "failed", ...
        transferred, remaining, total: bytes of RAM; 0 where QEMU does not say.
        rounds: how often it has looked for dirty pages.
        bytes_per_second: what it sends.
        dirty_bytes_per_second: what the guest writes.
        expected_downtime_ms: how long the guest would rest now, milliseconds.
    """

    event: ClassVar[str] = "qemu"
    end: str
    status: str
    transferred: int
    remaining: int
    total: int
    rounds: int
    bytes_per_second: float
    dirty_bytes_per_second: float
    expected_downtime_ms: int

    def text(self) -> str:
        """Return it in one line."""
        words = [f"QEMU, {self.end}: {self.status}"]
        if self.total:
            done = self.total - min(self.remaining, self.total)
            words += [
                f"{100 * done // self.total} % of {self.total / _MIB:.1f} MiB",
                f"round {self.rounds}",
                f"{self.bytes_per_second / _MIB:.1f} MiB/s",
                f"dirtied {self.dirty_bytes_per_second / _MIB:.1f} MiB/s",
            ]
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class GuestState(MigrationEvent):
    """What a QEMU's guest does when all is done.

    Attributes:
        qemu: its QMP socket.
        status: its run state: "running", "paused", "postmigrate", ...
    """

    event: ClassVar[str] = "guest"
    qemu: str
    status: str

    def text(self) -> str:
        """Return it in one line."""
        return f"the guest of the QEMU at {self.qemu} is {self.status}"


@dataclass(frozen=True, slots=True)
class Recorded(MigrationEvent):
    """How the QEMU was started that a snapshot is of.

    Attributes:
        arguments: the program and its arguments.
        directory: its working directory.
    """

    event: ClassVar[str] = "recorded"
    arguments: tuple[str, ...]
    directory: str

    def text(self) -> str:
        """Return it in one line."""
        words = "".join(
            c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
            for c in shlex.join(self.arguments)
        )
        return f"the QEMU of this snapshot was started as: {words}"


@dataclass(frozen=True, slots=True)
class Spawned(MigrationEvent):
    """A QEMU that was started runs on.

    Attributes:
        pid: its process id.
        qmp: its QMP socket.
        log: the file that its messages go to.
    """

    event: ClassVar[str] = "spawned"
    pid: int
    qmp: str
    log: str

    def text(self) -> str:
        """Return it in one line."""
        return f"the QEMU runs on: pid {self.pid}, QMP socket {self.qmp}, messages in {self.log}"


@dataclass(frozen=True, slots=True)
class Migrated(MigrationEvent):
    """A machine has gone from one QEMU to another, as the source says (query-migrate).

    Attributes:
        source, destination: their QMP sockets.
        uri: where they met; "fd:" for a private socket.
        bytes: of RAM that were moved.
        rounds: how often the source looked for dirty pages.
        setup_seconds, total_seconds, downtime_seconds: what it took, and how long the guest rested.
        bytes_per_second: as the source has it.
    """

    event: ClassVar[str] = "migrated"
    source: str
    destination: str
    uri: str
    bytes: int
    rounds: int
    setup_seconds: float
    total_seconds: float
    downtime_seconds: float
    bytes_per_second: float

    def text(self) -> str:
        """Return it in some lines."""
        return "\n".join(
            (
                f"migrated from {self.source} to {self.destination}: "
                f"{self.bytes / _MIB:.1f} MiB of RAM",
                f"  rounds        {self.rounds}",
                f"  setup         {self.setup_seconds:.3f} s",
                f"  total         {self.total_seconds:.3f} s "
                f"({self.bytes_per_second / _MIB:.1f} MiB/s)",
                f"  downtime      {self.downtime_seconds:.3f} s",
            )
        )
