# SPDX-License-Identifier: Apache-2.0
"""What may be said when, as tables: the grammar that `rules` judges a trace by.

docs/protocol.md: control channel, READY rule, RAM phases, end of stream.
"""

from __future__ import annotations

from enum import Enum, auto

from rdma_mig.wire.control import ControlType

__all__ = [
    "COMMITS",
    "DYNAMIC",
    "ENDS",
    "NEXT",
    "OPENING",
    "RECORD_SIZES",
    "REPLIES",
    "WORDS",
    "Side",
    "State",
    "sender_of",
]


class Side(Enum):
    """An end of the migration."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def other(self) -> Side:
        """The end that this one talks with."""
        return Side.DESTINATION if self is Side.SOURCE else Side.SOURCE


class State(Enum):
    """Where the conversation on the control channel stands."""

    CONNECTING = auto()
    STREAM = auto()
    PHASE = auto()
    REPLY = auto()  # within a phase: the destination owes an answer
    PHASE_DONE = auto()  # REGISTER_FINISHED has been seen, the phase's own end has not
    STREAM_OVER = auto()
    ACKNOWLEDGED = auto()
    BROKEN = auto()  # ERROR has been said


# What each state lets each side say, and where that leads; READY and ERROR are judged apart.
NEXT: dict[State, dict[tuple[Side, ControlType], State]] = {
    State.CONNECTING: {},
    State.STREAM: {
        (Side.SOURCE, ControlType.QEMU_FILE): State.STREAM,
        (Side.SOURCE, ControlType.STREAM_END): State.STREAM_OVER,
        (Side.DESTINATION, ControlType.FINAL_ACK): State.ACKNOWLEDGED,
    },
    State.PHASE: {
        (Side.SOURCE, ControlType.RAM_BLOCKS_REQUEST): State.REPLY,
        (Side.SOURCE, ControlType.REGISTER_REQUEST): State.REPLY,
        (Side.SOURCE, ControlType.UNREGISTER_REQUEST): State.REPLY,
        (Side.SOURCE, ControlType.COMPRESS): State.PHASE,
        (Side.SOURCE, ControlType.REGISTER_FINISHED): State.PHASE_DONE,
    },
    State.REPLY: {
        (Side.DESTINATION, ControlType.RAM_BLOCKS_RESULT): State.PHASE,
        (Side.DESTINATION, ControlType.REGISTER_RESULT): State.PHASE,
        (Side.DESTINATION, ControlType.UNREGISTER_FINISHED): State.PHASE,
    },
    State.PHASE_DONE: {},
    State.STREAM_OVER: {(Side.DESTINATION, ControlType.FINAL_ACK): State.ACKNOWLEDGED},
    State.ACKNOWLEDGED: {},
    State.BROKEN: {},
}
WORDS = {
    State.CONNECTING: "before the connection is up",
    State.STREAM: "between RAM phases",
    State.PHASE: "in a RAM phase",
    State.REPLY: "where a reply is due",
    State.PHASE_DONE: "behind REGISTER_FINISHED and before the phase's end",
    State.STREAM_OVER: "behind STREAM_END",
    State.ACKNOWLEDGED: "behind FINAL_ACK",
    State.BROKEN: "behind ERROR",
}
REPLIES = {
    ControlType.RAM_BLOCKS_REQUEST: ControlType.RAM_BLOCKS_RESULT,
    ControlType.REGISTER_REQUEST: ControlType.REGISTER_RESULT,
    ControlType.UNREGISTER_REQUEST: ControlType.UNREGISTER_FINISHED,
}
DYNAMIC = (ControlType.REGISTER_REQUEST, ControlType.COMPRESS, ControlType.UNREGISTER_REQUEST)
RECORD_SIZES = {
    ControlType.RAM_BLOCKS_RESULT: 32,
    ControlType.COMPRESS: 24,
    ControlType.REGISTER_REQUEST: 24,
    ControlType.UNREGISTER_REQUEST: 24,
    ControlType.REGISTER_RESULT: 16,
}
COMMITS = {
    Side.SOURCE: {"EOF": ("control", ControlType.QEMU_FILE)},
    Side.DESTINATION: {
        "READY": ("control", ControlType.READY),
        "FINAL_ACK": ("control", ControlType.FINAL_ACK),
        "SHUT": ("return-path", ControlType.QEMU_FILE),
    },
}
# Events of rdma_cm of which an end sees one at least before it counts as connected.
OPENING = {
    Side.SOURCE: {"CONNECT_RESPONSE", "ESTABLISHED"},
    Side.DESTINATION: {"CONNECT_REQUEST"},
}
ENDS = ("completed", "failed", "cancelled")


def sender_of(role: str, kind: str) -> Side:
    """Return which side has sent a message that a trace of this role has as ``out`` or ``in``."""
    side = Side.SOURCE if role == "outgoing" else Side.DESTINATION
    return side if kind == "out" else side.other
