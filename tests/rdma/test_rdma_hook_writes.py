# SPDX-License-Identifier: Apache-2.0
"""When the hooks write, and how often: as the device's own counters see it, and the peer's memory.

A write's packets are full but for the last one, and it is acknowledged by itself: so a write of 40
pages takes fewer packets than two of 20. What each length takes is measured first, with writes of
that length.
"""

from __future__ import annotations

import threading
import time

import pytest
import rdma_kit as kit
from hooks_kit import CHUNK, PAGE, Destination, Traffic, begin, pages, run

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_ROUND,
    ram_control_after_iterate,
    ram_control_before_iterate,
)
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.wire.control import ControlType
from rdma_mig.wire.stream import encode_section_part

pytestmark = pytest.mark.rdma

# Probes of a silent peer are packets too: there are none within these tests.
QUIET = EndpointOptions(probe_seconds=600)
MODES = pytest.mark.parametrize("pin_all", [True, False], ids=["pin-all", "dynamic"])
# Packets of a control message: it fits one, and is acknowledged with another one.
MESSAGE = 2
# Messages that a chunk without key takes: REGISTER_REQUEST, REGISTER_RESULT, and the next READY.
NEW_CHUNK = 3


def packets_of_a_write(*lengths: int) -> dict[int, int]:
    """Packets that one write of so many pages takes, for each of these lengths."""
    packets = {}
    with kit.RawListener(QUIET) as listener, GuestRam(kit.BLOCKS) as there:
        accepted = kit.Worker(listener.accept)
        with kit.dial(listener.uri, options=QUIET) as source:
            region = accepted.result().endpoint.register(
                there[0].memory.address, there[0].block.length, what="RAM", remote_write=True,
                holder=there[0].memory.hold("the test"),
            )  # fmt: skip
            traffic = Traffic()
            for count in lengths:
                source.write(region.address, region.rkey, bytes(count * PAGE))
                packets[count], messages = traffic.new()
                assert messages == 0
        listener.peer.endpoint.deregister_all()
    return packets


@MODES
def test_each_border_ends_a_run_once(ram, pin_all):
    """N pages in a row make one write; a gap, another block, a chunk's border, a stream byte."""
    price = packets_of_a_write(1, 20, 21, 40, CHUNK)
    assert price[40] < price[20] + price[20]
    destination = []

    def save(file: QEMUFile, _counts: object) -> None:
        begin(file)
        there = destination[0] if destination else ready.wait() and destination[0]
        file.put(encode_section_part(kit.RAM_ID))
        ram_control_before_iterate(file, RAM_CONTROL_ROUND)
        traffic = Traffic()

        def wrote(what: str, *writes: int, chunks: int = 0, messages: int = 0) -> None:
            messages += 0 if pin_all else chunks * NEW_CHUNK
            wanted = sum(price[count] for count in writes) + MESSAGE * messages, messages
            assert traffic.new() == wanted, f"{what}, writes of {writes} pages"

        pages(file, 0, 40)
        wrote("the run is pending")
        pages(file, 41, 1)
        wrote("a gap", 40, chunks=1)
        assert there.has(ram, 0, 40)
        assert there.lacks(40, 4)
        pages(file, 40, 1)
        wrote("backwards", 1)
        pages(file, 41, 20)
        wrote("one run again")
        pages(file, 0, 1, block=1)
        wrote("another block", 21)
        assert there.has(ram, 40, 21)
        assert there.lacks(61, 1)
        assert there.lacks(0, 1, block=1)
        pages(file, 1, CHUNK - 1, block=1)
        wrote("up to the chunk's border")
        pages(file, CHUNK - 20, 20)
        wrote("a whole chunk", CHUNK, chunks=1)
        assert there.has(ram, 0, CHUNK, block=1)
        assert there.lacks(CHUNK - 20, 20)
        pages(file, CHUNK, 40)
        wrote("over the chunk's border", 20)
        file.put(b"bytes")
        wrote("bytes that are not sent")
        file.flush()
        wrote("stream bytes", 40, chunks=1, messages=2)
        assert there.stream.endswith(b"bytes")
        file.flush()
        wrote("no bytes")
        # What was written is done with: the next page begins a new run, though it is the next one.
        pages(file, CHUNK + 40, 1)
        pages(file, CHUNK + 41, 19)
        wrote("the run behind them")
        ram_control_after_iterate(file, RAM_CONTROL_ROUND)
        wrote("the end of the phase", 20, messages=2)
        assert there.has(ram, CHUNK - 20, 80)
        assert there.lacks(CHUNK + 60, 1)
        file.put(kit.SECTION_BREAK)

    ready = threading.Event()
    with kit.RawListener(QUIET) as listener:
        source = kit.Worker(lambda: run(listener.uri, ram, save, pin_all=pin_all, endpoint=QUIET))
        destination.append(Destination.set_up(listener, pin_all=pin_all))
        ready.set()
        destination[0].serve()
        source.result()


class Deaf:
    """The peer's adapter answers nothing within this context, and goes on behind it.

    Its queue pair is reset, which drops every packet without a word, and then brought back to
    where it was: the source's adapter sends again what nobody has acknowledged.
    """

    def __init__(self, peer: kit.Peer) -> None:
        self._endpoint = peer.endpoint
        self._pair = peer.endpoint._qp

    def __enter__(self) -> None:
        from pyverbs.qp import QPAttr

        # All that INIT, RTR and RTS set, sequence numbers included.
        self._attributes, _ = self._pair.query((1 << 20) - 1)
        self._pair.modify(QPAttr(qp_state=0), 1)

    def __exit__(self, *_: object) -> None:
        attributes = self._attributes
        self._pair.to_init(attributes)
        for slot in range(self._endpoint.options.slots):
            self._endpoint.queue.post_receive(slot)  # the reset has dropped them
        self._pair.to_rtr(attributes)
        self._pair.to_rts(attributes)


@MODES
def test_no_write_has_to_complete_before_the_end_of_the_phase(ram, pin_all):
    """The peer's adapter is deaf while pages are offered: they are taken, and none arrives.

    The peer has granted the next message already: what holds the end of the phase up is nothing
    but the writes, and when it is through the peer finds them all, before it reads a message.
    """
    deaf, offered, over = threading.Event(), threading.Event(), threading.Event()

    def save(file: QEMUFile, _counts: object) -> None:
        begin(file)
        file.put(encode_section_part(kit.RAM_ID))
        ram_control_before_iterate(file, RAM_CONTROL_ROUND)
        if not pin_all:
            pages(file, 0, 1)
            pages(file, 2, 1)  # the chunk has its key now
        assert deaf.wait(kit.patience(20))
        for page in range(4, 200, 2):
            pages(file, page, 1)
        offered.set()
        ram_control_after_iterate(file, RAM_CONTROL_ROUND)
        over.set()

    with kit.RawListener(QUIET) as listener:
        source = kit.Worker(lambda: run(listener.uri, ram, save, pin_all=pin_all, endpoint=QUIET))
        destination = Destination.set_up(listener, pin_all=pin_all)
        peer = listener.peer
        peer.ready()
        assert peer.expect(ControlType.QEMU_FILE)
        peer.ready()
        if not pin_all:
            destination.answer_register(peer.receive())
            peer.ready()
            while not destination.has(ram, 0, 1):
                time.sleep(0.01)
        with Deaf(peer):
            deaf.set()
            assert offered.wait(kit.patience(10))
            time.sleep(1)
            assert not over.is_set()
            assert destination.lacks(4, 200)
        assert over.wait(kit.patience(20))
        assert all(destination.has(ram, page, 1) for page in range(4, 200, 2))
        assert peer.expect(ControlType.REGISTER_FINISHED) == b""
        source.result()
