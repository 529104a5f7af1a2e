# SPDX-License-Identifier: Apache-2.0
"""Our destination against sources that misbehave: each failure is named, nothing is left behind."""

from __future__ import annotations

import itertools
import re
import struct
import threading
import time

import pytest
import rdma_kit as kit

from rdma_mig.errors import MigrationCancelled, MigrationTimeout, PeerGone, RemoteProtocolError
from rdma_mig.migration.events import Warned
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    RegisterRecord,
    ZeroRun,
    decode_ram_blocks,
)
from rdma_mig.wire.handshake import (
    FEATURE_FINAL_ACK,
    FEATURE_FRESH_BLOCKS,
    FLAG_EXTENSION,
    FLAG_PIN_ALL,
    Extension,
    PrivateData,
)
from rdma_mig.wire.stream import encode_hook

pytestmark = pytest.mark.rdma

AT_SOURCE = "still the source's"


def raw(kind: int, payload: bytes = b"", *, length: int | None = None, repeat: int = 1) -> bytes:
    """A message whose header may lie."""
    size = len(payload) if length is None else length
    return struct.pack(">III4x", size, kind, repeat) + payload


# ---- the handshake ----


def rejected(end, private_data, reason):
    """A client that is told why it is not served, which is warned of too."""
    with (
        pytest.raises(PeerGone, match=rf"rejected the connection \(reason 28\): .*{reason}"),
        kit.dial(end.uri, private_data),
    ):
        pytest.fail("it was accepted")


def served(end, room):
    """The source that comes afterwards is served as if nobody had been there before."""
    with kit.dial(end.uri) as peer:
        kit.until("device state sent", kit.act_as_source(peer))
        peer.close()
        end.succeed()
    assert [entry.name for entry in room.iterdir()] == ["vm"]


def warned(end):
    return [event.message for event in end.events if isinstance(event, Warned)]


@pytest.mark.parametrize("version", [0, 2, 0x01000000])
def test_other_version_is_rejected_with_a_reason_and_waiting_goes_on(room, version):
    with kit.incoming(room / "vm") as end:
        rejected(end, struct.pack(">II", version, 1), f"version is {version}")
        served(end, room)
    (line,) = warned(end)
    assert re.match(rf"turned \S+:\d+ away: private data version is {version}, .*; check", line)


def test_strangers_end_no_wait_before_its_limit(room):
    with kit.incoming(room / "vm", accept_seconds=2.0) as end:
        for private_data in (b"\xff\xff", b"GET / HTTP/1.1\r\n", b"\xff" * 56):
            rejected(end, private_data, "version is")
        with pytest.raises(MigrationTimeout, match="waiting for a source"):
            end.migration.wait(kit.patience(10))
    assert len(warned(end)) == 3
    assert list(room.iterdir()) == []


def test_short_private_data_is_no_version(room):
    # The transport pads to 56 bytes, so a destination sees garbage, not fewer bytes.
    with kit.incoming(room / "vm") as end:
        rejected(end, b"\xff\xff", "version is")
        served(end, room)


def test_client_that_does_not_confirm_is_given_up_and_waiting_goes_on(room):
    options = EndpointOptions(connect_seconds=1.0)
    with kit.incoming(room / "vm", endpoint=options) as end:
        with kit.half_open(end.uri):
            while not warned(end):
                assert not end.migration.wait(0.1), "it ended"
        served(end, room)
    (line,) = warned(end)
    assert re.fullmatch(r"turned \S+:\d+ away: it was accepted and did not .* within 1 s", line)


@pytest.mark.parametrize("flags", [0x7FFFFFFF, 0xFFFFFFFE, 0, FLAG_EXTENSION | FLAG_PIN_ALL])
def test_unknown_flags_and_padding_do_not_come_back(room, flags):
    # With FLAG_EXTENSION and no valid block behind it: that is padding, not an extension.
    asked = struct.pack(">II", 1, flags) + b"\xa5" * 48
    with kit.incoming(room / "vm") as end, kit.dial(end.uri, asked) as peer:
        granted = peer.endpoint.private_data
        assert granted[:8] == struct.pack(">II", 1, flags & FLAG_PIN_ALL)
        assert PrivateData.decode(granted).extension is None


def test_extension_comes_back_only_with_what_is_known(room):
    nonce = 0x0123456789ABCDEF
    asked = PrivateData(1, FLAG_PIN_ALL, Extension(0xFFFFFFFF, nonce)).encode()
    with kit.incoming(room / "vm") as end, kit.dial(end.uri, asked) as peer:
        granted = PrivateData.decode(peer.endpoint.private_data)
        assert granted.flags == FLAG_PIN_ALL
        assert granted.extension == Extension(FEATURE_FINAL_ACK | FEATURE_FRESH_BLOCKS, nonce)


def test_second_client_is_rejected_while_one_is_served(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        steps = kit.act_as_source(peer)
        kit.until("blocks known", steps)
        with pytest.raises(PeerGone, match="nobody listens"), kit.dial(end.uri):
            pytest.fail("it was accepted")
        kit.until("device state sent", steps)
        peer.close()
        end.succeed()
    assert (room / "vm" / "manifest.json").exists()


# ---- messages ----


def in_stream(peer):
    peer.expect(ControlType.READY)


def in_phase(peer):
    peer.stream(kit.HEAD + encode_hook())
    peer.expect(ControlType.READY)


def in_phase_blocks_known(peer):
    in_phase(peer)
    peer.send(ControlMessage(ControlType.RAM_BLOCKS_REQUEST))
    peer.expect(ControlType.RAM_BLOCKS_RESULT)
    peer.expect(ControlType.READY)


LIES = {
    "no header": raw(3)[:15],
    "empty": b"",
    "type 0": raw(0),
    "unknown type": raw(12),
    "length too small": raw(3, b"12345678", length=7),
    "length too large": raw(3, b"12345678", length=9),
    "length beyond all": raw(3, b"12345678", length=0xFFFFFFFF),
    "payload where none is": raw(4, b"\0" * 8),
    "stream bytes missing": raw(3),
    "records that are not there": raw(7, b"", length=0, repeat=1),
    "more records than there are": raw(7, RegisterRecord(0, 0, 0).encode(), repeat=2),
    "too many records": raw(10, b"", repeat=4097),
}


@pytest.mark.parametrize("where", [in_stream, in_phase])
@pytest.mark.parametrize("lie", LIES)
def test_message_that_lies_ends_it(room, where, lie):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        where(peer)
        peer.send(LIES[lie])
        error = end.fail(RemoteProtocolError)
        assert error.exit_status == 4
        assert AT_SOURCE in error.owner
    assert list(room.iterdir()) == []


READY = ControlMessage(ControlType.READY)
BLOCKS_REQUEST = ControlMessage(ControlType.RAM_BLOCKS_REQUEST)
FINISHED = ControlMessage(ControlType.REGISTER_FINISHED)
REGISTER = ControlMessage(ControlType.REGISTER_REQUEST, RegisterRecord(0, 0, 0).encode())
ZERO = ControlMessage(ControlType.COMPRESS, ZeroRun(0, 0, 0, 4096).encode())


@pytest.mark.parametrize(
    ("where", "message", "match"),
    [
        (in_stream, READY, "READY where QEMU_FILE was due"),
        (in_stream, BLOCKS_REQUEST, "RAM_BLOCKS_REQUEST where QEMU_FILE was due"),
        (in_stream, FINISHED, "REGISTER_FINISHED where QEMU_FILE was due"),
        (in_phase, READY, "READY in a registration phase"),
        (in_phase, FINISHED, "without asking for the RAM blocks"),
        (in_phase_blocks_known, BLOCKS_REQUEST, "asked twice"),
        (in_phase, REGISTER, "REGISTER_REQUEST in a registration phase"),
        (in_phase_blocks_known, ZERO, "COMPRESS in a registration phase"),
        (in_phase, ControlMessage(ControlType.QEMU_FILE, b"x"), "QEMU_FILE in a registration"),
    ],
)
def test_message_out_of_order_ends_it(room, where, message, match):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        where(peer)
        peer.send(message)
        assert AT_SOURCE in end.fail(RemoteProtocolError, match).owner
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("where", [in_stream, in_phase, in_phase_blocks_known])
def test_error_in_place_of_a_message_ends_it(room, where):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        where(peer)
        peer.send(ControlMessage(ControlType.ERROR))
        error = end.fail(PeerGone, "reported a failure")
        assert error.exit_status == 1
    assert list(room.iterdir()) == []


def test_stream_of_something_else_ends_it(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        peer.stream(b"SSH-2.0-OpenSSH_9.2\r\n")
        end.fail(RemoteProtocolError)
    assert list(room.iterdir()) == []


def test_ram_that_this_host_does_not_have_is_refused_before_it_is_allocated(room):
    from rdma_mig.errors import HostError
    from rdma_mig.wire.stream import StreamBlock, encode_ram_start

    head = kit.snapshot_kit.HEAD + encode_ram_start(2, [StreamBlock("pc.ram", 1 << 44)])
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        peer.stream(head + encode_hook())
        assert "free memory" in end.fail(HostError, "16777216 MiB of RAM").remedy
    assert list(room.iterdir()) == []


def test_message_larger_than_any_is_refused_by_the_device(room):
    wide = EndpointOptions(slots=4, slot_size=1 << 20)
    with kit.incoming(room / "vm") as end, kit.dial(end.uri, options=wide) as peer:
        in_stream(peer)
        peer.send(raw(3, b"\0" * 600_000), wait=False)
        end.fail(PeerGone, "receive .* failed")
    assert list(room.iterdir()) == []


# ---- a source that goes away, or says nothing ----


@pytest.mark.parametrize("step", kit.SOURCE_STEPS)
def test_source_that_disconnects_at_any_step(room, step):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        kit.until(step, kit.act_as_source(peer))
        if step == "RAM handed over":
            peer.expect(ControlType.READY)  # the READY that shows the commit point
        if step == "device state sent":
            peer.close()
            end.succeed()
            assert [entry.name for entry in room.iterdir()] == ["vm"]
            return
        began = time.monotonic()
        peer.close()
        error = end.fail(PeerGone, "closed the connection")
        assert time.monotonic() - began < kit.patience(2)
        committed = kit.SOURCE_STEPS.index(step) >= kit.COMMITTED
        assert (AT_SOURCE in error.owner) is not committed
    kept = [entry.name for entry in room.iterdir()]
    assert kept == (["vm.incomplete"] if committed else [])
    assert (str(room / "vm.incomplete") in error.remedy) is committed


@pytest.mark.parametrize("step", ["connected", "in setup", "in the last phase", "RAM handed over"])
def test_source_that_says_nothing_meets_the_stall_timeout(room, step):
    with kit.incoming(room / "vm", stall_seconds=1.0) as end, kit.dial(end.uri) as peer:
        kit.until(step, kit.act_as_source(peer))
        began = time.monotonic()
        error = end.fail(MigrationTimeout, "within 1 s")
        assert error.exit_status == 5
        assert "--timeout" in error.remedy
        assert time.monotonic() - began < kit.patience(4)


def test_total_limit_counts_from_the_connection(room):
    with kit.incoming(room / "vm", total_seconds=1.5) as end:
        time.sleep(1.6)  # no source yet: that is --accept-timeout's
        with kit.dial(end.uri) as peer:
            steps = kit.act_as_source(peer)
            kit.until("in setup", steps)
            end.fail(MigrationTimeout, "within")


def test_nobody_connects(room):
    with kit.incoming(room / "vm", accept_seconds=0.5) as end:
        with pytest.raises(MigrationTimeout, match="waiting for a source") as caught:
            end.migration.wait(kit.patience(5))
        assert caught.value.exit_status == 5
    assert list(room.iterdir()) == []


# ---- cancelled ----


@pytest.mark.parametrize("step", ["listening", *kit.SOURCE_STEPS])
def test_cancel_from_another_thread_ends_every_wait(room, step):
    with kit.incoming(room / "vm") as end:
        if step == "listening":
            check_cancel(end)
        else:
            with kit.dial(end.uri) as peer:
                kit.until(step, kit.act_as_source(peer))
                if step == "RAM handed over":
                    peer.expect(ControlType.READY)
                check_cancel(end)
    kept = [entry.name for entry in room.iterdir()]
    committed = step in kit.SOURCE_STEPS[kit.COMMITTED :]
    assert kept == (["vm.incomplete"] if committed else [])


def check_cancel(end):
    time.sleep(0.2)  # until it waits
    began = time.monotonic()
    threading.Timer(0, end.migration.cancel).start()
    with pytest.raises(MigrationCancelled) as caught:
        assert end.migration.wait(kit.patience(10))
    assert time.monotonic() - began < kit.patience(1)
    assert caught.value.exit_status == 5
    assert end.migration.state.status == "cancelled"


# ---- keys ----


def test_write_after_the_keys_were_withdrawn_fails(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        kit.until("RAM handed over", kit.act_as_source(peer))
        peer.expect(ControlType.READY)
        record = peer.records[0]
        with pytest.raises(PeerGone, match=r"RDMA write .* failed: remote access error"):
            peer.write(record.host_address, record.rkey, b"too late")
        peer.close()
        end.fail(PeerGone)
    assert b"too late" not in (room / "vm.incomplete" / "ram" / "0.raw").read_bytes()


def test_keys_reach_no_further_than_the_blocks(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        kit.until("blocks known", kit.act_as_source(peer))
        for record, block in zip(peer.records, kit.BLOCKS, strict=True):
            assert record.length == block.length
            assert record.rkey
        record = peer.records[1]
        with pytest.raises(PeerGone, match="remote access error"):
            peer.write(record.host_address + record.length - 4, record.rkey, b"12345678")
        end.migration.cancel()


def test_blocks_are_answered_in_stream_order_at_offsets_of_their_own(room):
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        in_phase(peer)
        peer.send(BLOCKS_REQUEST)
        lengths = [block.length for block in kit.BLOCKS]
        records = decode_ram_blocks(peer.expect(ControlType.RAM_BLOCKS_RESULT), lengths)
        starts = sorted((record.offset, record.length) for record in records)
        for (one, length), (other, _) in itertools.pairwise(starts):
            assert one + length <= other
        assert len({record.rkey for record in records}) == len(kit.BLOCKS)
