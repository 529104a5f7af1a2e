# SPDX-License-Identifier: Apache-2.0
"""Registration chunk by chunk: what a hostile peer may ask for, and how far each key reaches."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import rdma_kit as kit
import snapshot_kit

from rdma_mig.errors import PeerGone, RemoteProtocolError
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    RegisterRecord,
    RegisterResult,
    decode_ram_blocks,
    decode_register_results,
)
from rdma_mig.wire.stream import encode_hook, encode_section_end

pytestmark = pytest.mark.rdma

COMMAND = Path(sys.executable).with_name("rdma-migrate")
DYNAMIC = b"\0\0\0\1\0\0\0\0"
LENGTHS = [block.length for block in kit.BLOCKS]


def record(key, block, chunks):
    return struct.pack(">QI4xQ", key, block, chunks)


def zeros(value, block, offset, length):
    return struct.pack(">IIQQ", value, block, offset, length)


def message(kind, payload, repeat=1):
    return struct.pack(">III4x", len(payload), kind, repeat) + payload


def into_phase(peer):
    """Up to the last phase; return the blocks as the destination told them."""
    peer.stream(kit.HEAD + encode_hook())
    peer.command(ControlType.RAM_BLOCKS_REQUEST)
    records = decode_ram_blocks(peer.expect(ControlType.RAM_BLOCKS_RESULT), LENGTHS)
    peer.command(ControlType.REGISTER_FINISHED)
    peer.stream(kit.SECTION_BREAK + encode_section_end(kit.RAM_ID) + encode_hook())
    return records


def ask(peer, address, block, chunks=0):
    peer.expect(ControlType.READY)
    peer.send(message(ControlType.REGISTER_REQUEST, record(address, block, chunks)))
    return decode_register_results(peer.expect(ControlType.REGISTER_RESULT))[0]


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("REGISTER_REQUEST", lambda base, end: record(base, 3, 0)),
        ("REGISTER_REQUEST", lambda base, end: record(base, 0xFFFFFFFF, 0)),
        ("REGISTER_REQUEST", lambda base, end: record(end, 0, 0)),
        ("REGISTER_REQUEST", lambda base, end: record(2**64 - 1, 0, 0)),
        ("REGISTER_REQUEST", lambda base, end: record(base, 1, 0)),
        ("REGISTER_REQUEST", lambda base, end: record(base, 0, 4)),
        ("REGISTER_REQUEST", lambda base, end: record(base, 0, 2**64 - 1)),
        ("UNREGISTER_REQUEST", lambda base, end: record(0, 3, 0)),
        ("UNREGISTER_REQUEST", lambda base, end: record(4, 0, 0)),
        ("UNREGISTER_REQUEST", lambda base, end: record(0, 0, 2**64 - 1)),
        ("COMPRESS", lambda base, end: zeros(0, 3, base, 4096)),
        ("COMPRESS", lambda base, end: zeros(1, 0, base, 4096)),
        ("COMPRESS", lambda base, end: zeros(0, 0, end - 4096, 8192)),
        ("COMPRESS", lambda base, end: zeros(0, 0, base, 2**64 - 4096)),
        ("COMPRESS", lambda base, end: zeros(0, 0, end, 4096)),
        ("COMPRESS", lambda base, end: zeros(0, 0, base, 0)),
    ],
)
def test_destination_refuses_what_lies_outside_the_blocks(room, kind, payload):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri, DYNAMIC) as peer:
        base = into_phase(peer)[0].offset
        peer.expect(ControlType.READY)
        peer.send(message(ControlType[kind], payload(base, base + LENGTHS[0])))
        assert end.fail(RemoteProtocolError).exit_status == 4
    assert list(room.iterdir()) == []


def test_key_reaches_as_far_as_its_chunk(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri, DYNAMIC) as peer:
        blocks = into_phase(peer)
        assert all(block.rkey == 0 for block in blocks)
        result = ask(peer, blocks[0].offset + kit.MIB + 4096, 0)
        assert result.host_address == blocks[0].host_address
        peer.write(result.host_address + kit.MIB, result.rkey, b"first byte")
        peer.write(result.host_address + 2 * kit.MIB - 4, result.rkey, b"last")
        with pytest.raises(PeerGone, match="remote access error"):
            peer.write(result.host_address + 2 * kit.MIB - 4, result.rkey, b"one too far")
        end.migration.cancel()


def test_unregistered_key_is_dead_and_a_new_one_lives(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri, DYNAMIC) as peer:
        blocks = into_phase(peer)
        first = ask(peer, blocks[0].offset, 0)
        assert ask(peer, blocks[0].offset + 8192, 0).rkey == first.rkey, "once a chunk"
        peer.write(first.host_address, first.rkey, b"alive")
        peer.expect(ControlType.READY)
        peer.send(message(ControlType.UNREGISTER_REQUEST, record(0, 0, 0)))
        peer.expect(ControlType.UNREGISTER_FINISHED)
        second = ask(peer, blocks[0].offset, 0)
        assert second.rkey != first.rkey
        peer.write(second.host_address, second.rkey, b"again")
        with pytest.raises(PeerGone, match="remote access error"):
            peer.write(first.host_address, first.rkey, b"dead")
        end.migration.cancel()


def test_only_what_was_asked_for_is_pinned(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri, DYNAMIC) as peer:
        blocks = into_phase(peer)
        before = kit.pinned()
        ask(peer, blocks[0].offset, 0)
        assert kit.pinned() - before == kit.MIB
        ask(peer, blocks[0].offset + 3 * kit.MIB, 0)
        assert kit.pinned() - before == kit.MIB + LENGTHS[0] % kit.MIB, "a short last chunk"
        end.migration.cancel()


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (lambda base: RegisterResult(1, base + 4096).encode(), "said"),
        (lambda base: struct.pack(">I4xQ", 0, base), "key"),
        (lambda base: b"", "REGISTER_RESULT has 0 bytes"),
        (lambda base: RegisterResult(1, base).encode()[:15], "15 bytes"),
    ],
)
def test_source_refuses_a_result_that_cannot_be(kept, reply, match):
    with (
        kit.RawListener() as listener,
        kit.outgoing(kept, listener.uri, pin_all=False) as end,
    ):
        peer = listener.accept(DYNAMIC)
        steps = kit.act_as_destination(peer)
        kit.until("in the last phase", steps)
        while True:
            peer.ready()
            asked = peer.receive()
            if asked.type is ControlType.REGISTER_REQUEST:
                break
            assert asked.type is ControlType.COMPRESS
        assert RegisterRecord.decode(asked.payload).block_index == 0
        payload = reply(peer.records[0].host_address)
        peer.send(message(ControlType.REGISTER_RESULT, payload))
        end.fail(RemoteProtocolError, match)


def serve_phase(peer):
    """Serve the phase that carries RAM; return the types of all messages in it."""
    kinds = set()
    while True:
        peer.ready()
        got = peer.receive()
        kinds.add(got.type)
        if got.type is ControlType.REGISTER_FINISHED:
            return kinds
        if got.type is ControlType.REGISTER_REQUEST:
            asked = RegisterRecord.decode(got.payload)
            block = peer.records[asked.block_index]
            result = RegisterResult(block.rkey, block.host_address).encode()
            peer.send(ControlMessage(ControlType.REGISTER_RESULT, result))


CHUNK_BY_CHUNK = {
    ControlType.REGISTER_REQUEST, ControlType.COMPRESS, ControlType.REGISTER_FINISHED,
}  # fmt: skip


def assert_arrived(kept, peer):
    with kit.Snapshot.open(kept) as snapshot, kit.GuestRam(kit.BLOCKS) as ram:
        for guest, received in zip(ram, peer.ram, strict=True):
            snapshot.load_ram(guest.index, guest.memory, lambda: False)
            with guest.memory.view() as sent, received.memory.view() as arrived:
                assert sent == arrived, guest.block.idstr


@pytest.mark.parametrize("granted", [kit.PLAIN, DYNAMIC])
def test_source_that_did_not_ask_for_pin_all_registers_chunk_by_chunk(kept, granted):
    """Whatever the destination grants: the flag counts only where both ends have it."""
    with (
        kit.RawListener() as listener,
        kit.outgoing(kept, listener.uri, pin_all=False) as end,
    ):
        peer = listener.accept(granted)
        assert listener.asked[7] & 1 == 0
        kit.until("in the last phase", kit.act_as_destination(peer))
        assert serve_phase(peer) == CHUNK_BY_CHUNK
        assert_arrived(kept, peer)
        end.migration.cancel()


def test_refused_pin_all_falls_back_to_chunk_by_chunk_and_completes(kept):
    """The operator is told, and the destination gets RAM, device state and description whole."""
    after_ram = kit.SECTION_BREAK + snapshot_kit.STATE + kit.DESCRIPTION

    def destination():
        peer = listener.accept(DYNAMIC, 60)
        assert listener.asked[7] & 1 == 1
        kit.until("in the last phase", kit.act_as_destination(peer))
        assert serve_phase(peer) == CHUNK_BY_CHUNK
        stream = b""
        while len(stream) < len(after_ram):
            peer.ready()
            stream += peer.expect(ControlType.QEMU_FILE)
        assert stream == after_ram
        assert_arrived(kept, peer)
        peer.endpoint.close()  # as a QEMU does

    with kit.RawListener() as listener:
        served = kit.Worker(destination)
        sent = subprocess.run(
            [COMMAND, "outgoing", kept, listener.uri, "--rdma-pin-all"], check=False,
            capture_output=True, text=True, timeout=kit.patience(60), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        served.result()
    warnings = [line for line in sent.stderr.splitlines() if line.startswith("rdma-migrate: ")]
    assert len(warnings) == 1
    refused = r"rdma-migrate: warning: \S+ refused rdma-pin-all: RAM is pinned as it is used"
    assert re.fullmatch(refused, warnings[0])
    assert "the destination loaded all device state" in sent.stdout
