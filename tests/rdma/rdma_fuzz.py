# SPDX-License-Identifier: Apache-2.0
"""A peer that changes what it says, at random, over the device, against both of our ends.

    rdma_fuzz.py [--runs N] [--seed S] [--json]

It plays its part well up to some message. From there on, messages are changed, cut, lengthened,
said twice, left out, or replaced; private data and RDMA writes too. Each connection must end in
success or in a documented error, in time, and leave nothing. What `incoming` has kept is whole.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]

import rdma_kit as kit  # noqa: E402
import rdma_soak as soak  # noqa: E402

from rdma_mig.errors import MigrationError  # noqa: E402
from rdma_mig.snapshot import Snapshot  # noqa: E402
from rdma_mig.wire.control import ControlMessage, ControlType  # noqa: E402

#: How long either end waits for a word, seconds: a message that was left out ends in it.
SILENCE = 0.15
_HEADER = 16


class Changed:
    """Stands in for a peer's send(): changes what goes out, from some message on."""

    def __init__(self, peer: kit.Peer, choice: random.Random, first: int) -> None:
        self._send = peer.send
        self._choice = choice
        self._first = first
        self._count = 0
        #: What was done, for the report.
        self.done: list[str] = []

    def __call__(self, message: ControlMessage | bytes, *, wait: bool = True) -> None:
        raw = message if isinstance(message, bytes) else message.encode()
        self._count += 1
        if self._count <= self._first or (self.done and self._choice.random() < 0.6):
            self._send(raw, wait=wait)
            return
        change = self._choice.choice(_CHANGES)
        self.done.append(f"{change.__name__.strip('_')} in message {self._count}")
        for changed in change(self._choice, raw):
            self._send(changed, wait=wait)


def _flip_bits(choice: random.Random, raw: bytes) -> list[bytes]:
    changed = bytearray(raw)
    for _ in range(choice.choice([1, 1, 2, 8])):
        bit = choice.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
    return [bytes(changed)]


def _cut(choice: random.Random, raw: bytes) -> list[bytes]:
    return [raw[: choice.randrange(1, len(raw) + 1)]]


def _lengthen(choice: random.Random, raw: bytes) -> list[bytes]:
    return [raw + choice.randbytes(choice.choice([1, 8, 24, 4096]))]


def _header_lies(choice: random.Random, raw: bytes) -> list[bytes]:
    at = choice.choice([0, 4, 8, 12])
    value = choice.choice([0, 1, 2, 4095, 2**31, 2**32 - 1, choice.getrandbits(32)])
    return [raw[:at] + value.to_bytes(4, "big") + raw[at + 4 :]]


def _other_type(choice: random.Random, raw: bytes) -> list[bytes]:
    return [raw[:4] + choice.choice(list(ControlType)).to_bytes(4, "big") + raw[8:]]


def _number_in_payload(choice: random.Random, raw: bytes) -> list[bytes]:
    size = choice.choice([4, 8])
    if len(raw) < _HEADER + size:
        return [raw]
    at = choice.randrange(_HEADER, len(raw) - size + 1)
    value = choice.choice([0, 1, 4096, 2 ** (8 * size - 1), 2 ** (8 * size) - 1])
    return [raw[:at] + value.to_bytes(size, "big") + raw[at + size :]]


def _payload_anew(choice: random.Random, raw: bytes) -> list[bytes]:
    return [raw[:_HEADER] + choice.randbytes(len(raw) - _HEADER)]


def _twice(_choice: random.Random, raw: bytes) -> list[bytes]:
    return [raw, raw]


def _left_out(_choice: random.Random, _raw: bytes) -> list[bytes]:
    return []


def _another_first(choice: random.Random, raw: bytes) -> list[bytes]:
    return [choice.choice(_others()), raw]


def _another_instead(choice: random.Random, _raw: bytes) -> list[bytes]:
    return [choice.choice(_others())]


_CHANGES = [
    _flip_bits, _cut, _lengthen, _header_lies, _other_type, _number_in_payload, _payload_anew,
    _twice, _left_out, _another_first, _another_instead,
]  # fmt: skip


@functools.cache
def _others() -> list[bytes]:
    """Messages that the decoders' fuzzing has kept, and each type with nothing in it."""
    path = _TESTS / "fuzz" / "corpus" / "control.hex"
    kept = [bytes.fromhex(line) for line in path.read_text("ascii").split()]
    return kept + [
        (0).to_bytes(4, "big") + kind.to_bytes(4, "big") + b"\0\0\0\1\0\0\0\0"
        for kind in ControlType
    ]


def _private_data(choice: random.Random) -> bytes:
    whole = choice.choice([kit.PLAIN, soak.DYNAMIC])
    if choice.random() < 0.9:
        return whole
    return choice.choice(_CHANGES[:3])(choice, whole)[0][:56]


def one(number: int, seed: int, kept: Path, room: Path) -> tuple[str, None, MigrationError | None]:
    """One connection; return what was done, None since it may end either way, and its error."""
    choice = random.Random(seed)
    if number % 2:
        what, error = _against_incoming(choice, room)
    else:
        what, error = _against_outgoing(choice, kept)
    return f"seed {seed}: {what}", None, error


def _against_incoming(choice: random.Random, room: Path) -> tuple[str, MigrationError | None]:
    output = room / "vm"
    done: list[str] = []
    with (
        kit.incoming(output, stall_seconds=SILENCE, total_seconds=5, accept_seconds=2) as end,
        contextlib.suppress(MigrationError, AssertionError, OSError),
    ):
        with kit.dial(end.uri, _private_data(choice)) as peer:
            changed = Changed(peer, choice, choice.randrange(14))
            _play(peer, changed, kit.act_as_source(peer), choice)
            done = changed.done
            if choice.random() < 0.5:
                peer.endpoint.wait_disconnected(SILENCE)
        error = soak.ended(end)
    error = soak.ended(end)
    if output.exists():
        if error is not None:
            raise AssertionError(f"{done}: a snapshot has its name, and it failed: {error}")
        with Snapshot.open(output) as snapshot:
            snapshot.verify()
    elif error is None:
        raise AssertionError(f"{done}: it completed without a snapshot")
    return f"incoming, {', '.join(done) or 'nothing changed'}", error


def _against_outgoing(choice: random.Random, kept: Path) -> tuple[str, MigrationError | None]:
    done: list[str] = []
    reply = _private_data(choice)
    with kit.RawListener() as listener:

        def work() -> None:
            peer = listener.accept(reply, 3)
            changed = Changed(peer, choice, choice.randrange(12))
            try:
                _play(peer, changed, kit.act_as_destination(peer), choice)
            finally:
                done.extend(changed.done)
                finished.set()
                if choice.random() < 0.5:
                    peer.endpoint.wait_disconnected(SILENCE)
                peer.endpoint.disconnect()

        finished = threading.Event()
        worker = kit.Worker(work)
        with kit.outgoing(
            kept,
            listener.uri,
            stall_seconds=SILENCE,
            total_seconds=5,
            pin_all=choice.random() < 0.5,
        ) as end:
            error = soak.ended(end)
        with contextlib.suppress(MigrationError, AssertionError, OSError, ValueError):
            worker.result()
    return f"outgoing, {', '.join(done) or 'nothing changed'}", error


def _play(peer: kit.Peer, changed: Changed, steps: Any, choice: random.Random) -> None:
    """Play the part as far as the other end lets us; it hangs up when it has had enough."""
    peer.send = changed  # type: ignore[method-assign]
    receive = peer.receive
    peer.receive = lambda seconds=1.0: receive(min(seconds, 1.0))  # type: ignore[method-assign]
    for _step in steps:
        if peer.records and choice.random() < 0.03:
            record = choice.choice(peer.records)
            key = choice.choice([record.rkey, 0, choice.getrandbits(32)])
            where = choice.choice([0, record.host_address + record.length, record.host_address - 1])
            changed.done.append("a write outside")
            peer.write(where, key, b"outside")


if __name__ == "__main__":
    sys.exit(soak.main("fuzz", __doc__, one))
