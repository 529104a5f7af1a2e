# SPDX-License-Identifier: Apache-2.0
"""Our source against destinations that misbehave: each failure is named, the snapshot stays."""

from __future__ import annotations

import struct
import threading
import time
from dataclasses import replace

import pytest
import rdma_kit as kit

from rdma_mig.errors import (
    MigrationCancelled,
    MigrationError,
    MigrationTimeout,
    PeerGone,
    RemoteProtocolError,
)
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    FinalAck,
    RegisterResult,
    encode_ram_blocks,
)
from rdma_mig.wire.handshake import (
    FEATURE_FINAL_ACK,
    FEATURE_FRESH_BLOCKS,
    FLAG_PIN_ALL,
    Extension,
    PrivateData,
)

pytestmark = pytest.mark.rdma

UNCHANGED = "is unchanged"
READY = ControlMessage(ControlType.READY)


# ---- the handshake ----


def test_source_asks_for_pin_all_and_its_extension(kept):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        listener.accept()
        asked = PrivateData.decode(listener.asked)
        assert asked.flags == FLAG_PIN_ALL
        assert asked.extension is not None
        assert asked.extension.features == FEATURE_FINAL_ACK | FEATURE_FRESH_BLOCKS
        assert listener.asked[:8] == b"\0\0\0\1\x80\0\0\1", "what QEMU reads of it"
        end.migration.cancel()


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (struct.pack(">II", 2, 1), "version is 2"),
        (b"\xff", "version is"),
    ],
)
def test_reply_that_cannot_be_used(kept, reply, match):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        listener.accept(reply)
        assert UNCHANGED in end.fail(RemoteProtocolError, match).owner


@pytest.mark.parametrize("damage", [None, 8, 16, 20, 40, 55])
def test_reply_whose_extension_is_damaged_is_a_qemu_to_us(kept, damage):
    reply = bytearray(PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode())
    if damage is not None:
        reply[damage] ^= 1
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept(bytes(reply))
        kit.until("all received", kit.act_as_destination(peer))
        if damage is None:
            peer.send(ControlMessage(ControlType.FINAL_ACK, FinalAck(0).encode()))
        else:
            peer.close()
        end.succeed()
        confirmed = end.events[-1].confirmed
        assert ("acknowledged" in confirmed) is (damage is None)


# ---- messages ----


@pytest.mark.parametrize("step", kit.DESTINATION_STEPS[:-1])
def test_error_in_place_of_ready_ends_it(kept, step):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept()
        kit.until(step, kit.act_as_destination(peer))
        peer.send(ControlMessage(ControlType.ERROR))
        error = end.fail(MigrationError, "reported a failure")
        assert error.exit_status == 1
        assert UNCHANGED in error.owner


ODD = {
    "a reply that nobody asked for": ControlMessage(
        ControlType.REGISTER_RESULT, RegisterResult(1, 4096).encode()
    ),
    "a stream that runs the other way": ControlMessage(ControlType.QEMU_FILE, b"x"),
    "an early acknowledgement": ControlMessage(ControlType.FINAL_ACK, FinalAck(0).encode()),
    "a header that lies": struct.pack(">III4x", 1, 2, 1),
    "an unknown type": struct.pack(">III4x", 0, 99, 1),
}


@pytest.mark.parametrize("step", ["connected", "in setup", "blocks told", "RAM written"])
@pytest.mark.parametrize("odd", ODD)
def test_anything_else_than_ready_ends_it(kept, step, odd):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept()
        kit.until(step, kit.act_as_destination(peer))
        peer.send(ODD[odd])
        error = end.fail(RemoteProtocolError)
        assert error.exit_status == 4
        assert UNCHANGED in error.owner


def test_two_readys_in_a_row_are_found_where_a_reply_is_due(kept):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept()
        kit.until("blocks asked for", kit.act_as_destination(peer))
        peer.ready()
        end.fail(RemoteProtocolError, "READY where RAM_BLOCKS_RESULT was due")


def test_ready_in_place_of_the_final_acknowledgement(kept):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        reply = PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode()
        peer = listener.accept(reply)
        kit.until("all received", kit.act_as_destination(peer))
        peer.ready()
        end.fail(RemoteProtocolError, "READY where FINAL_ACK was due")


def test_destination_that_could_not_keep_it_says_why(kept):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept(PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode())
        kit.until("all received", kit.act_as_destination(peer))
        peer.send(ControlMessage(ControlType.FINAL_ACK, FinalAck(1, "disk full").encode()))
        assert UNCHANGED in end.fail(MigrationError, "failed to keep it: disk full").owner


@pytest.mark.parametrize("text", [b"disk\x1b[2Jfull", b"\xff", b"two\nlines"])
def test_acknowledgement_that_would_reach_the_terminal_raw(kept, text):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept(PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode())
        kit.until("all received", kit.act_as_destination(peer))
        payload = struct.pack(">I", 1) + text
        peer.send(struct.pack(">III4x", len(payload), ControlType.FINAL_ACK, 1) + payload)
        with pytest.raises(MigrationError) as caught:
            assert end.migration.wait(kit.patience(10))
        assert str(caught.value).isprintable()


WRONG = {
    "one block less": lambda records: records[:-1],
    "one block more": lambda records: [*records, records[0]],
    "other lengths": lambda records: [
        replace(records[0], length=records[0].length + 4096), *records[1:]
    ],
    "other order": lambda records: records[::-1],
    "key 0": lambda records: [*records[:-1], replace(records[-1], rkey=0)],
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_blocks_that_differ_end_it_before_anything_is_written(kept, wrong):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept()
        kit.until("blocks asked for", kit.act_as_destination(peer))
        records = WRONG[wrong](kit.offer(peer))
        peer.send(ControlMessage(ControlType.RAM_BLOCKS_RESULT, encode_ram_blocks(records)))
        assert UNCHANGED in end.fail(RemoteProtocolError).owner
        assert all(not any(bytes(guest.memory.view()[:4096])) for guest in peer.ram)


@pytest.mark.parametrize("what", ["key", "address"])
def test_key_or_address_that_is_not_the_destinations_fails_the_writes(kept, what):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept()
        steps = kit.act_as_destination(peer)
        kit.until("blocks asked for", steps)
        records = kit.offer(peer)
        wrong = {
            "key": replace(records[0], rkey=records[0].rkey ^ 0x5500),
            "address": replace(records[0], host_address=records[0].host_address + 4096),
        }[what]
        reply = encode_ram_blocks([wrong, *records[1:]])
        peer.send(ControlMessage(ControlType.RAM_BLOCKS_RESULT, reply))
        peer.ready()
        peer.expect(ControlType.REGISTER_FINISHED)
        peer.ready()
        peer.expect(ControlType.QEMU_FILE)
        error = end.fail(PeerGone, "RDMA write .* failed: remote access error")
        assert "withdrew its memory" in error.remedy


# ---- a destination that goes away, or says nothing ----


@pytest.mark.parametrize("step", kit.DESTINATION_STEPS)
def test_destination_that_disconnects_at_any_step(kept, step):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept()
        kit.until(step, kit.act_as_destination(peer))
        began = time.monotonic()
        peer.close()
        if step == "all received":
            end.succeed()  # as a QEMU does, which acknowledges nothing
            return
        error = end.fail(MigrationError, "closed the connection")
        assert error.exit_status == 1
        assert UNCHANGED in error.owner
        assert time.monotonic() - began < kit.patience(2)


def test_destination_that_disconnects_before_its_acknowledgement(kept):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept(PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode())
        kit.until("all received", kit.act_as_destination(peer))
        peer.close()
        end.fail(PeerGone, "closed the connection.* final acknowledgement")


def test_nobody_listens(kept, address):
    with kit.RawListener() as listener:
        uri = listener.uri
    with kit.outgoing(kept, uri) as end:
        with pytest.raises(PeerGone, match="nobody listens at") as caught:
            end.migration.wait(kit.patience(15))
        assert "start the destination first" in caught.value.remedy


def test_destination_that_does_not_accept(kept):
    from rdma_mig.verbs.endpoint import EndpointOptions

    with (
        kit.RawListener() as listener,
        kit.outgoing(kept, listener.uri, endpoint=EndpointOptions(connect_seconds=1.0)) as end,
    ):
        end.fail(MigrationTimeout, "no answer within 1 s while connecting")


@pytest.mark.parametrize("step", ["connected", "blocks asked for", "end mark received"])
def test_destination_that_says_nothing_meets_the_stall_timeout(kept, step):
    with (
        kit.RawListener() as listener,
        kit.outgoing(kept, listener.uri, stall_seconds=1.0) as end,
    ):
        peer = listener.accept()
        kit.until(step, kit.act_as_destination(peer))
        began = time.monotonic()
        assert end.fail(MigrationTimeout, "within 1 s").exit_status == 5
        assert time.monotonic() - began < kit.patience(4)


# ---- cancelled ----


@pytest.mark.parametrize("step", ["not accepted", *kit.DESTINATION_STEPS])
def test_cancel_from_another_thread_ends_every_wait(kept, step):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        if step != "not accepted":
            reply = PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode()
            kit.until(step, kit.act_as_destination(listener.accept(reply)))
        time.sleep(0.2)  # until it waits
        began = time.monotonic()
        threading.Timer(0, end.migration.cancel).start()
        with pytest.raises(MigrationCancelled) as caught:
            assert end.migration.wait(kit.patience(10))
        assert time.monotonic() - began < kit.patience(1)
        assert caught.value.exit_status == 5
        assert UNCHANGED in caught.value.owner
