# SPDX-License-Identifier: Apache-2.0
"""A peer that changes what it says, at random, over the device, against both of our ends.

    rdma_fuzz.py [--runs N] [--seed S] [--json]

It plays its part well up to some message, with pin-all, chunk by chunk, or with a return path. From
there on, messages are changed, cut, lengthened, said twice, left out, or replaced; private data and
RDMA writes too. Each connection must end in success or in a documented error, in time, and leave
nothing. What `incoming` has kept is whole.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]

import rdma_kit as kit  # noqa: E402
import rdma_soak as soak  # noqa: E402
import snapshot_kit  # noqa: E402

from rdma_mig.errors import MigrationError, PeerGone  # noqa: E402
from rdma_mig.snapshot import Snapshot  # noqa: E402
from rdma_mig.wire.control import (  # noqa: E402
    ControlMessage,
    ControlType,
    RegisterRecord,
    RegisterResult,
    ZeroRun,
    decode_register_requests,
    decode_register_results,
)
from rdma_mig.wire.return_path import Pong, Shut  # noqa: E402
from rdma_mig.wire.stream import CommandType, encode_command  # noqa: E402

#: How long either end waits for a word, seconds: a message that was left out ends in it.
SILENCE = 0.15
_HEADER = 16
_PING = 7
#: The stream of a source with a return path begins with these commands.
_COMMANDS = encode_command(CommandType.OPEN_RETURN_PATH) + encode_command(
    CommandType.PING, _PING.to_bytes(4, "big")
)
_HEAD_WITH_COMMANDS = kit.HEAD.replace(snapshot_kit.HEAD, snapshot_kit.HEAD + _COMMANDS, 1)


class Changed:
    """Stands in for a peer's send(): changes what goes out, from some message on."""

    def __init__(
        self, peer: kit.Peer, choice: random.Random, first: int, done: list[str] | None = None
    ) -> None:
        self._send = peer.send
        self._choice = choice
        self._count = 0
        #: So many messages are left as they are.
        self.first = first
        #: What was done, for the report.
        self.done: list[str] = [] if done is None else done

    def __call__(self, message: ControlMessage | bytes, *, wait: bool = True) -> None:
        raw = message if isinstance(message, bytes) else message.encode()
        self._count += 1
        if self._count <= self.first or (self.done and self._choice.random() < 0.6):
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
    # What the command would print: one line that says who runs the guest.
    if error is not None and not (error.owner and str(error).isprintable()):
        raise AssertionError(f"{what}: {str(error)!r} is no line for an operator")
    return f"seed {seed}: {what}", None, error


def _against_incoming(choice: random.Random, room: Path) -> tuple[str, MigrationError | None]:
    output = room / "vm"
    done: list[str] = []
    private_data = _private_data(choice)
    with kit.incoming(output, stall_seconds=SILENCE, total_seconds=5, accept_seconds=2) as end:
        with (
            contextlib.suppress(MigrationError, AssertionError, OSError),
            contextlib.ExitStack() as connections,
        ):
            try:
                peer = connections.enter_context(kit.dial(end.uri, private_data))
            except PeerGone:
                # It was turned away, and waiting goes on.
                done.append("other private data at first")
                private_data = kit.PLAIN
                peer = connections.enter_context(kit.dial(end.uri, private_data))
            changed = Changed(peer, choice, choice.randrange(14), done)
            head = kit.HEAD
            if private_data == soak.DYNAMIC:
                changed.first = choice.randrange(24)
                _write_chunk_by_chunk(peer, choice)
            elif choice.random() < 0.3:
                head = _HEAD_WITH_COMMANDS
                second = connections.enter_context(kit.dial(end.uri, private_data))
                _listen(second, peer)
                _change_a_little(second, choice, done)
            _play(peer, changed, kit.act_as_source(peer, head), choice)
            if choice.random() < 0.5:
                peer.endpoint.wait_disconnected(SILENCE)
        error = soak.ended(end)
    if output.exists():
        if error is not None:
            raise AssertionError(f"{done}: a snapshot has its name, and it failed: {error}")
        with Snapshot.open(output) as snapshot:
            snapshot.verify()
    elif error is None:
        raise AssertionError(f"{done}: it completed without a snapshot")
    return f"incoming, {', '.join(done) or 'nothing changed'}", error


def _change_a_little(second: kit.Peer, choice: random.Random, done: list[str]) -> None:
    """Change what is said on a second connection, one time in two: few messages cross it."""
    first = choice.choice([0, 1, 99, 99])
    second.send = Changed(second, choice, first, done)  # type: ignore[method-assign]


def _write_chunk_by_chunk(peer: kit.Peer, choice: random.Random) -> None:
    """Let a raw source ask for the keys of what it writes, give them back, and clear zeros."""
    write = peer.write

    def ask(kind: ControlType, records: list[bytes]) -> None:
        peer.expect(ControlType.READY)
        peer.send(ControlMessage(kind, b"".join(records), len(records)))

    def with_keys(_address: int, _rkey: int, data: bytes) -> None:
        for _ in range(choice.randrange(1, 4)):
            index = choice.randrange(len(peer.records))
            block = peer.records[index]
            chunk = choice.randrange(-(-block.length // kit.MIB))
            at = chunk * kit.MIB
            key = RegisterRecord(block.offset + at, index).encode()
            ask(ControlType.REGISTER_REQUEST, [key] * choice.choice([1, 1, 2]))
            result = decode_register_results(peer.expect(ControlType.REGISTER_RESULT))[0]
            write(result.host_address + at, result.rkey, data)
            if choice.random() < 0.5:
                run = ZeroRun(0, index, block.offset + at, 4096).encode()
                ask(ControlType.COMPRESS, [run])
            if choice.random() < 0.5:
                ask(ControlType.UNREGISTER_REQUEST, [RegisterRecord(chunk, index).encode()])
                peer.expect(ControlType.UNREGISTER_FINISHED)

    peer.write = with_keys  # type: ignore[method-assign]


def _listen(second: kit.Peer, peer: kit.Peer) -> None:
    """Let a raw source hear the return path: the PONG after the head, SHUT after the rest."""
    stream = peer.stream
    words = {
        kit.HEAD[-8:]: Pong(_PING).encode(),
        kit.DESCRIPTION[-8:]: Shut(0).encode(),
    }

    def and_hear(data: bytes) -> None:
        stream(data)
        for last, word in words.items():
            if last in data:
                second.ready()
                assert second.expect(ControlType.QEMU_FILE, 2) == word

    peer.stream = and_hear  # type: ignore[method-assign]


def _against_outgoing(choice: random.Random, kept: Path) -> tuple[str, MigrationError | None]:
    done: list[str] = []
    reply = _private_data(choice)
    pin_all = choice.random() < 0.5
    return_path = choice.random() < 0.3
    with kit.RawListener() as listener:

        def work() -> None:
            peer = listener.accept(reply, 3, return_path=return_path)
            # With keys chunk by chunk more is said. A last word needs most of the rest as it was.
            first = choice.randrange(12 if pin_all and reply == kit.PLAIN else 24)
            changed = Changed(
                peer, choice, 99 if return_path and choice.random() < 0.5 else first, done
            )
            _answer_requests(peer)
            try:
                if not return_path:
                    _play(peer, changed, kit.act_as_destination(peer), choice)
                    return
                second = listener.second(2)
                _change_a_little(second, choice, done)
                _say(second, Pong(1))
                _play(peer, changed, kit.act_as_destination(peer), choice)
                _say(second, Shut(0))
            finally:
                if choice.random() < 0.5:
                    peer.endpoint.wait_disconnected(SILENCE)
                peer.endpoint.disconnect()

        worker = kit.Worker(work)
        with kit.outgoing(
            kept,
            listener.uri,
            stall_seconds=SILENCE,
            total_seconds=5,
            pin_all=pin_all,
            return_path=return_path,
        ) as end:
            error = soak.ended(end)
        with contextlib.suppress(MigrationError, AssertionError, OSError, ValueError):
            worker.result()
    return f"outgoing, {', '.join(done) or 'nothing changed'}", error


def _say(second: kit.Peer, frame: Pong | Shut) -> None:
    """Say a word on the return path, asked or not, as QEMU does."""
    second.send(ControlMessage(ControlType.QEMU_FILE, frame.encode(), repeat=0))


def _answer_requests(peer: kit.Peer) -> None:
    """Let a raw destination answer the requests for keys that come before the end of a phase."""
    expect = peer.expect

    def past_requests(kind: ControlType, seconds: float = 10) -> bytes:
        if kind is not ControlType.REGISTER_FINISHED:
            return expect(kind, seconds)
        while True:
            message = peer.receive(seconds)
            if message.type is ControlType.REGISTER_REQUEST:
                results = []
                for record in decode_register_requests(message.payload):
                    block = peer.records[record.block_index]
                    results.append(RegisterResult(block.rkey, block.host_address).encode())
                peer.send(ControlMessage(ControlType.REGISTER_RESULT, b"".join(results)))
            elif message.type is not ControlType.COMPRESS:
                assert message.type is kind
                return message.payload
            peer.ready()

    peer.expect = past_requests  # type: ignore[method-assign]


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
            kit.Peer.write(peer, where, key, b"outside")


if __name__ == "__main__":
    sys.exit(soak.main("fuzz", __doc__, one))
