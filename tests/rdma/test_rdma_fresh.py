# SPDX-License-Identifier: Apache-2.0
"""What is not sent to memory that is zero at the destination, and what is asked for at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import rdma_kit as kit
import snapshot_kit
from hooks_kit import Destination

from rdma_mig.memory import RamBlock
from rdma_mig.transport import outgoing
from rdma_mig.transport.ram_writer import RamWriter
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    RegisterRecord,
    decode_register_requests,
    encode_ram_blocks,
)
from rdma_mig.wire.handshake import FEATURE_FRESH_BLOCKS, FLAG_PIN_ALL, Extension, PrivateData

pytestmark = pytest.mark.rdma

MODES = pytest.mark.parametrize("pin_all", [False, True], ids=["dynamic", "pin-all"])
HOLES = (RamBlock("pc.ram", 8 * kit.MIB),)


class Watched(Destination):
    """Notes which chunks it is asked to register."""

    asked: list[tuple[int, int, int]]

    def answer_register(self, message: ControlMessage) -> None:
        for record in decode_register_requests(message.payload):
            assert isinstance(record, RegisterRecord)
            chunk = (record.key - self._peer.records[record.block_index].offset) // kit.MIB
            self.asked.append((record.block_index, chunk, record.chunks))
        super().answer_register(message)


def destination(listener, blocks, *, pin_all, features, fresh) -> Watched:
    """Listen for a source, and tell it which blocks are zero; the others are full of 0xff."""
    extension = Extension(features, 1) if features else None
    flags = FLAG_PIN_ALL if pin_all else 0
    peer = listener.accept(PrivateData(1, flags, extension).encode())
    there = Watched(peer, blocks)
    there.asked = []
    peer.ready()
    peer.expect(ControlType.QEMU_FILE)
    peer.ready()
    peer.expect(ControlType.RAM_BLOCKS_REQUEST)
    records = [
        replace(record, fresh=number in fresh)
        for number, record in enumerate(kit.offer(peer, blocks))
    ]
    for guest in peer.ram:
        if guest.index not in fresh:
            with guest.memory.view() as view:
                view[:] = b"\xff" * len(view)
    peer.send(ControlMessage(ControlType.RAM_BLOCKS_RESULT, encode_ram_blocks(records)))
    there.serve(until=kit.DESCRIPTION)
    return there


def check_equal(directory: Path, there: Watched, blocks) -> None:
    """Compare all memory, once what was announced as zero is, as in a real destination."""
    for run in there.zero_runs:
        guest = there._peer.ram[run.block_index]
        start = run.offset - guest.offset
        with guest.memory.view() as view:
            view[start : start + run.length] = bytes(run.length)
    for number, block in enumerate(blocks):
        sent = (directory / "ram" / f"{number}.raw").read_bytes()
        with there._peer.ram[number].memory.view() as view:
            assert bytes(view) == sent, block.idstr


@MODES
def test_zeros_are_sent_to_blocks_only_that_are_not_zero(kept, pin_all):
    """At the source vga.vram is zero, and the third chunk of pc.ram."""
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri, pin_all=pin_all) as out:
        there = destination(
            listener, kit.BLOCKS, pin_all=pin_all, features=FEATURE_FRESH_BLOCKS, fresh={0}
        )
        listener.peer.endpoint.disconnect()
        out.succeed()
        check_equal(kept, there, kit.BLOCKS)
    zeros = {run.block_index for run in there.zero_runs}
    assert zeros == (set() if pin_all else {1})
    done = out.events[-1]
    assert done.duplicate_pages == (1 if pin_all else 2) * kit.MIB // 4096


@MODES
def test_what_a_snapshot_has_not_is_not_looked_at(tmp_path, pin_all, monkeypatch):
    """With pin-all, too: neither is it looked at nor pinned at the source."""
    with snapshot_kit.guest(HOLES) as memories:
        with memories[0].view() as view:
            view[kit.MIB : kit.MIB + 4096] = snapshot_kit.noise(4096)
        kept = snapshot_kit.keep(tmp_path / "kept", memories, HOLES)
    writers = []

    class Noted(RamWriter):
        def exchange_blocks(self):
            writers.append(self)
            before = kit.pinned()
            seconds = super().exchange_blocks()
            self.pinned_here = kit.pinned() - before
            return seconds

    monkeypatch.setattr(outgoing, "RamWriter", Noted)
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri, pin_all=pin_all) as out:
        there = destination(
            listener, HOLES, pin_all=pin_all, features=FEATURE_FRESH_BLOCKS, fresh={0}
        )
        listener.peer.endpoint.disconnect()
        out.succeed()
        check_equal(kept, there, HOLES)
    [writer] = writers
    assert writer.zero_bytes == 7 * kit.MIB
    assert writer.queue.zero_bytes == 0, "these were looked at"
    # The destination, all of whose memory is, lives in this process.
    assert writer.pinned_here == 8 * kit.MIB + (kit.MIB if pin_all else 0)
    assert out.events[-1].writes == 1


@MODES
def test_padding_of_a_qemu_says_nothing(kept, pin_all):
    """The same bytes from an end without the feature: its memory is full of 0xff."""
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri, pin_all=pin_all) as out:
        there = destination(listener, kit.BLOCKS, pin_all=pin_all, features=0, fresh=set())
        listener.peer.endpoint.disconnect()
        out.succeed()
        check_equal(kept, there, kit.BLOCKS)


@MODES
def test_large_blocks_are_taken_for_zero_only_when_told_so(tmp_path, pin_all):
    """A block of 64 MiB, whose zeros are not sent then, and a smaller one, whose zeros are."""
    blocks = (RamBlock("pc.ram", 64 * kit.MIB), RamBlock("vga.vram", kit.MIB))
    with snapshot_kit.guest(blocks) as memories:
        with memories[0].view() as view:
            view[kit.MIB : 2 * kit.MIB] = snapshot_kit.noise(kit.MIB)
        kept = snapshot_kit.keep(tmp_path / "kept", memories, blocks)
    options = {"pin_all": pin_all, "assume_zero": True}
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri, **options) as out:
        there = destination(listener, blocks, pin_all=pin_all, features=0, fresh={0})
        listener.peer.endpoint.disconnect()
        out.succeed()
        check_equal(kept, there, blocks)
    assert {run.block_index for run in there.zero_runs} == (set() if pin_all else {1})
    assert out.events[-1].writes == (2 if pin_all else 1)


def test_chunks_with_data_are_asked_for_together_and_no_others(tmp_path):
    with snapshot_kit.guest(HOLES) as memories:
        with memories[0].view() as view:
            view[: 2 * kit.MIB] = snapshot_kit.noise(2 * kit.MIB)
            view[5 * kit.MIB + 8192] = 1
            view[6 * kit.MIB] = 2
        kept = snapshot_kit.keep(tmp_path / "kept", memories, HOLES)
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri, pin_all=False) as out:
        there = destination(listener, HOLES, pin_all=False, features=0, fresh={0})
        listener.peer.endpoint.disconnect()
        out.succeed()
        check_equal(kept, there, HOLES)
    assert there.asked == [(0, 0, 1), (0, 5, 1)]
    runs = [(run.offset // kit.MIB, run.length // kit.MIB) for run in there.zero_runs]
    assert runs == [(2, 3), (7, 1)]
    # One write for chunks in a row: a key for all of them covers their borders.
    assert out.events[-1].writes == 2
