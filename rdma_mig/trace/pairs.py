# SPDX-License-Identifier: Apache-2.0
"""The traces of both ends of one migration, held against each other. No input or output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rdma_mig.errors import UsageError
from rdma_mig.trace.reading import Numbered
from rdma_mig.trace.rules import TraceRules, Violation

__all__ = ["PairViolation", "Traced", "check_pair", "clock_offset"]


@dataclass(frozen=True, slots=True)
class Traced:
    """One end's trace.

    Attributes:
        name: of its file, for messages.
        records: all of them.
        rules: what was learned when they were judged.
    """

    name: str
    records: Sequence[Numbered]
    rules: TraceRules

    @property
    def channels(self) -> set[str]:
        """Names of those on which it has sent or got messages."""
        return {each["channel"] for each in self.records if each.record.kind in ("out", "in")}

    def messages(self, kind: str, channel: str) -> list[Numbered]:
        """The control messages that it has sent ("out") or got ("in") on a channel."""
        return [
            each for each in self.records if each.record.kind == kind and each["channel"] == channel
        ]


class PairViolation(Violation):
    """A rule between two traces that is broken.

    Attributes:
        name: of the file in which the record is.
    """

    def __init__(self, name: str, number: int, rule: str) -> None:
        super().__init__(number, rule)
        self.name = name


def order(one: Traced, other: Traced) -> tuple[Traced, Traced]:
    """Return source and destination of two traces.

    Raises:
        UsageError: both are of the same role.
    """
    if one.rules.role == other.rules.role:
        raise UsageError(
            f"{one.name} and {other.name} are both traces of {one.rules.role}",
            remedy="name one of each end of a migration",
        )
    return (one, other) if one.rules.role == "outgoing" else (other, one)


def check_pair(one: Traced, other: Traced) -> None:
    """Hold two traces, each of which keeps the rules by itself, against each other.

    What one end has sent is what the other got, in this order. The tail may be missing where the
    migration failed: what is under way then arrives no more.

    Raises:
        PairViolation: the first difference.
        UsageError: they are not the two ends of a migration.
    """
    source, destination = order(one, other)
    whole = one.rules.status == other.rules.status == "completed"
    if source.rules.pin_all != destination.rules.pin_all:
        raise _at(destination, "connected", "the ends differ about pin-all")
    for sender, receiver in ((source, destination), (destination, source)):
        for channel in sorted({*sender.channels, *receiver.channels}):
            _same_messages(sender, receiver, channel, whole=whole)
    if whole and source.rules.phases != destination.rules.phases:
        raise _at(
            destination,
            "end",
            f"{destination.rules.phases} RAM phases, the source has {source.rules.phases}",
        )
    _keys_for_writes(source, destination)


def _at(traced: Traced, kind: str, rule: str) -> PairViolation:
    number = next((e.number for e in traced.records if e.record.kind == kind), 1)
    return PairViolation(traced.name, number, rule)


def _same_messages(sender: Traced, receiver: Traced, channel: str, *, whole: bool) -> None:
    sent, got = sender.messages("out", channel), receiver.messages("in", channel)
    for there, here in zip(sent, got, strict=False):
        if any(there[name] != here[name] for name in ("type", "length", "repeat")):
            raise PairViolation(
                receiver.name,
                here.number,
                f"{here['type']} of {here['length']} bytes on {channel}, where {sender.name} has "
                f"{there['type']} of {there['length']} bytes as record {there.number}",
            )
    # What a process that was killed has sent may lack its record, what it got may be unread.
    if whole and len(sent) != len(got):
        longer, shorter = (sender, receiver) if len(sent) > len(got) else (receiver, sender)
        extra = (sent if longer is sender else got)[min(len(sent), len(got))]
        raise PairViolation(
            longer.name,
            extra.number,
            f"{extra['type']} on {channel}, of which {shorter.name} knows nothing",
        )


def _keys_for_writes(source: Traced, destination: Traced) -> None:
    if source.rules.pin_all:
        return
    for each in source.records:
        if each.record.kind != "write":
            continue
        known = destination.rules.chunks.get(each["block"], set())
        last = each["last"] if each["whole"] else each["chunk"]
        for chunk in range(each["chunk"], last + 1):
            if chunk not in known:
                raise PairViolation(
                    source.name,
                    each.number,
                    f"a write to chunk {chunk} of {each['block']!a}, which {destination.name} has "
                    "not registered",
                )


def clock_offset(one: Traced, other: Traced) -> float:
    """Return the seconds to add to the times of ``other``, so that they are those of ``one``.

    Both ends record a message when it has arrived, so the median difference of their times tells
    their clocks apart better than the clocks of two hosts do. Without messages these are taken.
    """
    differences = [
        there.record.t - here.record.t
        for channel in sorted(one.channels)
        for kind, mirror in (("out", "in"), ("in", "out"))
        for there, here in zip(
            one.messages(kind, channel), other.messages(mirror, channel), strict=False
        )
    ]
    if differences:
        return median(differences)
    return float(other.records[0]["clock"]) - float(one.records[0]["clock"])
