# SPDX-License-Identifier: Apache-2.0
"""The rules of the protocol, as a state machine over the records of one end's trace.

No input or output: records go in, the first rule that is broken comes out as a `Violation`. Both
ends are judged by the same machine, since a trace shows a message where its end has dealt with it:
what a source sends (``out`` there) is what its destination gets (``in`` there), and in that order
(docs/protocol.md: control channel, READY rule, RAM phases, return path, end of stream).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from rdma_mig.memory.blocks import CHUNK_SIZE
from rdma_mig.trace.grammar import (
    COMMITS,
    DYNAMIC,
    ENDS,
    NEXT,
    OPENING,
    RECORD_SIZES,
    REPLIES,
    WORDS,
    Side,
    State,
    sender_of,
)
from rdma_mig.trace.reading import Numbered
from rdma_mig.wire.control import CONTROL_MAX_PAYLOAD, EMPTY, MAX_REPEAT, ControlType

__all__ = ["PHASE_SHOWN_SINCE", "TraceRules", "Violation", "check_records"]

PHASE_SHOWN_SINCE = 2
"""Version of a trace from which on it has what the rules are about."""

# Those beside the first are numbered from 1.
_SIDE_CHANNEL = re.compile(r"connection-([1-9]|1[0-5])", re.ASCII)
# Chunks that one registration is followed over; a larger one is none of ours.
_BEYOND_MAX = 1 << 16


class Violation(Exception):
    """A rule that a trace breaks.

    Attributes:
        number: of the record, from 1.
        rule: what has to be and is not, one line.
    """

    def __init__(self, number: int, rule: str) -> None:
        super().__init__(f"record {number}: {rule}")
        self.number = number
        self.rule = rule


@dataclass(slots=True)
class _Keys:
    """What is registered: chunk numbers by block, or None for the whole of it."""

    held: dict[str, set[int | None]] = field(default_factory=dict)
    asked: set[tuple[str, int]] = field(default_factory=set)  # answered by the destination, too

    @property
    def any(self) -> str:
        return next((block for block, chunks in self.held.items() if chunks), "")


class TraceRules:
    """Judges the records of one trace, in their order.

    Attributes:
        role: "incoming" or "outgoing", once the first record was seen.
        pin_all, rdma: of the connection, once it is up.
        chunks: all chunks that were ever registered here, by block; dynamic registration only.
        phases: RAM phases that have ended, that of setup included.
        status: how it ended; empty before.
    """

    def __init__(self) -> None:
        self.role = ""
        self.rdma = False
        self.pin_all = False
        self.chunks: dict[str, set[int]] = {}
        self.phases = 0
        self.status = ""
        self._side = Side.SOURCE
        self._last = 0.0
        self._state = State.CONNECTING
        self._cm: set[str] = set()
        self._request: ControlType | None = None
        self._requested = False  # RAM_BLOCKS
        self._blocks = 0
        self._in_phase = False
        self._rounds = 0
        self._last_round = False
        self._credit = {"control": 0, "return-path": 0}
        self._answered = False  # a first message on the return path
        self._side_ends: dict[str, int] = {}  # phases ended on each connection beside the first
        self._keys = _Keys()
        self._fresh: list[tuple[str, int]] = []  # registered, and the answer not yet seen
        self._commit: tuple[str, str] | None = None  # by, state
        self._sent_since_commit: set[tuple[str, ControlType]] = set()
        self._files = 0  # QEMU_FILE messages since the last phase

    def feed(self, record: Numbered) -> None:
        """Judge the next record.

        Raises:
            Violation: it breaks a rule; nothing more is to be fed then.
        """
        kind = record.record.kind
        if record.record.t < self._last:
            self._fail(record, f"its time, {record.record.t:.6f} s, lies before the one before it")
        self._last = record.record.t
        if self.status:
            self._fail(record, f"{kind!r} behind the end of the migration")
        if (kind == "begin") != (not self.role):
            self._fail(record, "a second 'begin'" if self.role else "nothing comes before 'begin'")
        match kind:
            case "begin":
                self._begin(record)
            case "cm":
                self._cm.add(record["event"])
            case "connected":
                self._connected(record)
            case "out" | "in":
                self._message(record)
            case "phase":
                self._phase(record)
            case "round":
                self._round(record)
            case "register":
                self._register(record)
            case "deregister":
                self._deregister(record)
            case "write":
                self._write(record)
            case "commit":
                self._commits(record)
            case "end":
                self._end(record)

    def finish(self, number: int) -> None:
        """Say that there are no more records; ``number`` is the last one's.

        Raises:
            Violation: the trace is not that of a migration that has ended.
        """
        if not self.status:
            raise Violation(
                number,
                "it is the last one, and no 'end': the process was killed, or runs still",
            )

    @staticmethod
    def _fail(record: Numbered, rule: str) -> NoReturn:
        raise Violation(record.number, rule)

    # ---- begin, connection, end ----

    def _begin(self, record: Numbered) -> None:
        if record["role"] not in ("incoming", "outgoing"):
            self._fail(record, f"there is no role {record['role'][:32]!a}")
        if record["version"] < PHASE_SHOWN_SINCE:
            self._fail(
                record,
                f"the trace is of version {record['version']}, which does not say enough; "
                f"{PHASE_SHOWN_SINCE} does",
            )
        self.role = record["role"]
        self._side = Side.SOURCE if self.role == "outgoing" else Side.DESTINATION

    def _connected(self, record: Numbered) -> None:
        if self._state is not State.CONNECTING:
            self._fail(record, "the migration is connected already")
        self.rdma = record["device"] is not None
        if self.rdma and not self._cm & OPENING[self._side]:
            self._fail(record, "connected without an event of rdma_cm that says so")
        self.pin_all = record["pin_all"]
        self._state = State.STREAM

    def _end(self, record: Numbered) -> None:
        status = record["status"]
        if status not in ENDS:
            self._fail(record, f"there is no end {status[:32]!a}")
        if held := self._keys.any:
            self._fail(record, f"keys of {held!a} were not withdrawn before the end")
        if status == "completed" and self.rdma:
            if self._in_phase or self._state is State.REPLY:
                self._fail(record, "completed within a RAM phase")
            if not self._last_round:
                self._fail(record, "completed without a last RAM phase")
            if self._commit is None or self._commit[1] != "passed":
                self._fail(record, "completed without having passed the commit point")
        self.status = status

    # ---- messages ----

    def _message(self, record: Numbered) -> None:
        channel, name = record["channel"], record["type"]
        if channel not in self._credit and not _SIDE_CHANNEL.fullmatch(channel):
            self._fail(record, f"there is no channel {channel[:32]!a}")
        if name not in ControlType.__members__:
            self._fail(record, f"there is no control message {name[:32]!a}")
        message = ControlType[name]
        sender = sender_of(self.role, record.record.kind)
        self._check_size(record, message)
        if channel == "return-path":
            self._on_return_path(record, sender, message)
        elif channel != "control":
            self._on_side_connection(record, sender, message)
        else:
            self._on_control(record, sender, message)
        if record.record.kind == "out":
            self._sent_since_commit.add((channel, message))

    def _check_size(self, record: Numbered, message: ControlType) -> None:
        length, repeat = record["length"], record["repeat"]
        one = RECORD_SIZES.get(message)
        if message in EMPTY and length:
            self._fail(record, f"{message.name} with {length} bytes, it has none")
        if message is ControlType.QEMU_FILE and not 1 <= length <= CONTROL_MAX_PAYLOAD:
            self._fail(record, f"QEMU_FILE of {length} bytes, 1 to {CONTROL_MAX_PAYLOAD} are one")
        if one is not None and (length == 0 or length % one):
            self._fail(record, f"{message.name} of {length} bytes, its records are of {one}")
        if message in (ControlType.REGISTER_REQUEST, ControlType.UNREGISTER_REQUEST):
            assert one is not None
            if not 1 <= repeat <= MAX_REPEAT or length != one * repeat:
                self._fail(record, f"{message.name} of {length} bytes announces {repeat} records")

    def _on_control(self, record: Numbered, sender: Side, message: ControlType) -> None:
        state = self._state
        if state is not State.CONNECTING and not self.rdma:
            self._fail(record, f"{message.name} on a transport without control messages")
        if message is ControlType.ERROR:
            self._state = State.BROKEN
            return
        if message is ControlType.READY:
            self._ready(record, sender)
            return
        after = NEXT[state].get((sender, message))
        if after is None:
            self._fail(record, f"{message.name} by the {sender.value} {WORDS[state]}")
        if sender is Side.SOURCE:
            if not self._credit["control"]:
                self._fail(record, f"{message.name} without a READY for it")
            self._credit["control"] -= 1
        self._apply(record, message)
        self._state = after

    def _ready(self, record: Numbered, sender: Side) -> None:
        if sender is not Side.DESTINATION:
            self._fail(record, "READY by the source on the control channel")
        if self._state is State.REPLY:
            assert self._request is not None
            self._fail(record, f"READY before the reply, {REPLIES[self._request].name}")
        if self._state not in (State.STREAM, State.PHASE, State.PHASE_DONE):
            self._fail(record, f"READY {WORDS[self._state]}")
        if self._credit["control"]:
            self._fail(record, "a second READY, the one before it has not been used")
        self._credit["control"] += 1

    def _apply(self, record: Numbered, message: ControlType) -> None:
        """Check and note what a message means beyond its place."""
        match message:
            case ControlType.QEMU_FILE | ControlType.STREAM_END:
                self._files += 1
            case ControlType.RAM_BLOCKS_REQUEST:
                if self._requested:
                    self._fail(record, "RAM_BLOCKS_REQUEST for the second time")
                self._requested = True
                self._request = message
            case ControlType.RAM_BLOCKS_RESULT:
                self._expect_reply(record, message)
                self._blocks = record["length"] // 32
                if self.pin_all and self._side is Side.DESTINATION:
                    self._require_blocks(record)
            case ControlType.REGISTER_REQUEST | ControlType.UNREGISTER_REQUEST:
                self._fresh = []
                self._request = message
            case ControlType.REGISTER_RESULT:
                self._expect_reply(record, message)
                self._keys.asked.update(self._fresh)
                self._fresh = []
            case ControlType.UNREGISTER_FINISHED:
                self._expect_reply(record, message)
        if message in DYNAMIC or message is ControlType.REGISTER_FINISHED:
            if not self._blocks:
                self._fail(record, f"{message.name} before the RAM blocks are agreed on")
            if self.pin_all and message in DYNAMIC:
                self._fail(record, f"{message.name} although all RAM is pinned")

    def _expect_reply(self, record: Numbered, message: ControlType) -> None:
        assert self._request is not None
        if REPLIES[self._request] is not message:
            self._fail(record, f"{message.name} in answer to {self._request.name}")
        self._request = None

    def _require_blocks(self, record: Numbered) -> None:
        whole = sum(None in chunks for chunks in self._keys.held.values())
        if whole != self._blocks:
            self._fail(
                record, f"{self._blocks} RAM blocks are announced and {whole} are registered"
            )

    def _on_return_path(self, record: Numbered, sender: Side, message: ControlType) -> None:
        if message is ControlType.ERROR:
            return
        if message is ControlType.READY:
            if sender is not Side.SOURCE:
                self._fail(record, "READY by the destination on the return path")
            if self._credit["return-path"]:
                self._fail(record, "a second READY on the return path, the first is not used")
            self._credit["return-path"] += 1
            return
        if message is not ControlType.QEMU_FILE or sender is not Side.DESTINATION:
            self._fail(record, f"{message.name} by the {sender.value} on the return path")
        # A QEMU sends the first one unasked.
        if not self._credit["return-path"] and self._answered:
            self._fail(record, "QEMU_FILE on the return path without a READY for it")
        self._credit["return-path"] = 0
        self._answered = True

    def _on_side_connection(self, record: Numbered, sender: Side, message: ControlType) -> None:
        channel = record["channel"]
        if message is not ControlType.REGISTER_FINISHED or sender is not Side.SOURCE:
            self._fail(record, f"{message.name} by the {sender.value} on {channel}")
        ended = self._side_ends[channel] = self._side_ends.get(channel, 0) + 1
        if not self._in_phase or ended != self.phases + 1:
            self._fail(
                record, f"the end of RAM phase {ended - 1} on {channel}, {self.phases} is due"
            )

    # ---- phases ----

    def _phase(self, record: Numbered) -> None:
        number, state = record["number"], record["state"]
        if state == "begin":
            if self._state is not State.STREAM or self._in_phase:
                self._fail(record, f"a RAM phase begins {WORDS[self._state]}")
            if number != self.phases:
                self._fail(record, f"RAM phase {number} where {self.phases} is due")
            if not self._files:
                self._fail(record, "a RAM phase that no part of the stream has announced")
            if self._last_round and self._side is Side.SOURCE:
                self._fail(record, "a RAM phase behind the last one")
            if self._side is Side.DESTINATION and number != self._rounds:
                self._fail(record, f"RAM phase {number} in round {self._rounds}")
            self._in_phase = True
            self._state = State.PHASE
            return
        if state != "end":
            self._fail(record, f"there is no state {state[:32]!a} of a phase")
        if self._state is not State.PHASE_DONE or not self._in_phase or number != self.phases:
            self._fail(record, f"RAM phase {number} ends without REGISTER_FINISHED")
        for channel, ended in self._side_ends.items():
            if ended != number + 1:
                self._fail(record, f"RAM phase {number} ends, and has not ended on {channel}")
        self._in_phase = False
        self.phases += 1
        self._files = 0
        self._state = State.STREAM

    def _round(self, record: Numbered) -> None:
        if self._last_round:
            self._fail(record, "a round behind the last one")
        if record["number"] != self._rounds + 1:
            self._fail(record, f"round {record['number']} where {self._rounds + 1} is due")
        if self._in_phase:
            self._fail(record, "a round within a RAM phase")
        # A source counts a round when its phase has ended, a destination when it is announced.
        due = record["number"] + (1 if self._side is Side.SOURCE else 0)
        if self.rdma and self.phases != due:
            self._fail(record, f"round {record['number']} with {self.phases} RAM phases behind it")
        self._rounds += 1
        self._last_round = record["last"]

    # ---- memory ----

    def _register(self, record: Numbered) -> None:
        block, chunk = record["block"], record["chunk"]
        if not self._in_phase:
            self._fail(record, f"{block!a} is registered outside of a RAM phase")
        held = self._keys.held.setdefault(block, set())
        if chunk in held:
            self._fail(record, f"{_memory(block, chunk)} is registered twice")
        # A source that knows what is zero may register what is not, chunks in a row by themselves.
        parts = self.pin_all and self._side is Side.SOURCE
        if (chunk is None) != self.pin_all and not (parts and chunk is not None):
            how = "whole block" if chunk is None else "chunk"
            self._fail(record, f"a {how} of {block!a} is registered, with pin-all {self.pin_all}")
        if chunk is None:
            if self._request is not ControlType.RAM_BLOCKS_REQUEST:
                self._fail(record, f"{block!a} is registered and RAM_BLOCKS_REQUEST was not seen")
        else:
            if self._request is not ControlType.REGISTER_REQUEST and not parts:
                self._fail(record, f"{_memory(block, chunk)} is registered without a request")
            chunks = _chunks(record)
            if not parts:
                self._fresh += [(block, each) for each in chunks]
            self.chunks.setdefault(block, set()).update(chunks)
        held.add(chunk)

    def _deregister(self, record: Numbered) -> None:
        block, chunk = record["block"], record["chunk"]
        held = self._keys.held.get(block, set())
        if chunk not in held:
            self._fail(record, f"{_memory(block, chunk)} is withdrawn and was not registered")
        held.remove(chunk)
        if chunk is not None:
            self._keys.asked.difference_update((block, each) for each in _chunks(record))

    def _write(self, record: Numbered) -> None:
        block, first, last = record["block"], record["chunk"], record["last"]
        if self._side is not Side.SOURCE:
            self._fail(record, "a write by the destination")
        if self._state is not State.PHASE or not self.phases:
            where = "in setup" if self._in_phase and not self.phases else WORDS[self._state]
            self._fail(record, f"a write {where}")
        if last < first or not record["writes"] or not record["bytes"]:
            self._fail(record, "a write of nothing")
        if self.pin_all and not self._keys.held.get(block, set()):
            self._fail(record, f"a write to {block!a}, which is not registered")
        if None in self._keys.held.get(block, set()):
            return
        if not record["whole"]:
            last = first
        if last - first > record["bytes"]:
            self._fail(record, f"a write of {record['bytes']} bytes over {last - first} chunks")
        for chunk in range(first, last + 1):
            if self.pin_all:
                if chunk not in self.chunks.get(block, ()):
                    self._fail(record, f"a write to {_memory(block, chunk)}, not registered")
            elif (block, chunk) not in self._keys.asked:
                self._fail(record, f"a write to {_memory(block, chunk)} before its key was asked")

    # ---- the commit point ----

    def _commits(self, record: Numbered) -> None:
        by, state = record["by"], record["state"]
        if record["role"] != self._side.value:
            self._fail(record, f"a commit point of a {record['role'][:32]!a} in this trace")
        means = COMMITS[self._side].get(by)
        if means is None:
            self._fail(record, f"the {self._side.value} does not hand over by {by[:32]!a}")
        if state == "before":
            if self._commit is not None:
                self._fail(record, "the commit point for the second time")
            if not self._last_round or self._in_phase:
                self._fail(record, "the commit point before the last RAM phase has ended")
            if self._side is Side.DESTINATION and (held := self._keys.any):
                self._fail(record, f"the commit point while {held!a} can still be written")
            self._sent_since_commit = set()
        elif state == "passed":
            if self._commit != (by, "before"):
                self._fail(record, f"the commit point is passed by {by} without one before it")
            if self.rdma and means not in self._sent_since_commit:
                self._fail(record, f"the commit point is passed and its {by} was not sent")
        else:
            self._fail(record, f"there is no state {state[:32]!a} of the commit point")
        self._commit = (by, state)


def _chunks(record: Numbered) -> range:
    """The chunks that a registration is of: one key may be for several in a row."""
    first = record["chunk"]
    return range(first, first + 1 + min(max(record["bytes"] - 1, 0) // CHUNK_SIZE, _BEYOND_MAX))


def _memory(block: str, chunk: int | None) -> str:
    return f"{block!a}" if chunk is None else f"chunk {chunk} of {block!a}"


def check_records(records: Iterable[Numbered]) -> TraceRules:
    """Judge a whole trace, and return what was learned of it.

    Raises:
        Violation: the first rule that it breaks.
    """
    rules = TraceRules()
    number = 0
    for record in records:
        rules.feed(record)
        number = record.number
    rules.finish(number)
    return rules
