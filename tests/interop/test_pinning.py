# SPDX-License-Identifier: Apache-2.0
"""Without pin-all, an end of ours pins the chunks that were asked for, and no others.

How many were asked for says QEMU's trace, or which chunks of the snapshot hold data. What is
pinned says the kernel.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Qemu, fill_random, free_port, snapshot_blocks
from pins import ASKED, ASKING, PinWatch, chunks_in_trace, chunks_with_data
from support import MIB, Incoming, outgoing, patience, rdma_uri

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]

#: What an end may pin beside the chunks: its control buffers.
BESIDE = 8 * MIB


@pytest.mark.deadline(900)
@pytest.mark.parametrize("memory", [64, pytest.param(1024, marks=pytest.mark.full)])
def test_only_chunks_that_were_asked_for_are_pinned(memory: int, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    limit = seconds(memory)
    with Incoming(first, timeout=limit) as incoming, qemu(memory, "source", ASKING) as source:
        source.wait_heartbeat(2)
        # Low in RAM: behind it comes a long time in which nothing more is to be pinned.
        fill_random(source.memory_path, 1, 16 * MIB, memory * MIB // 16)
        source.set_capability("rdma-pin-all", False)
        source.set_parameter("max-bandwidth", 0)
        with PinWatch(incoming.process.pid) as into_first:
            source.migrate(incoming.uri)
            source.wait_migration()
            incoming.succeed()
        asked = chunks_in_trace(source.stderr(), ASKING)
    data = chunks_with_data(snapshot_blocks(first))
    assert memory // 16 < data <= asked
    check("incoming from QEMU", into_first, asked, memory)

    uri = rdma_uri(free_port())
    with (
        qemu(memory, "destination", ASKED, paused=True, incoming=uri) as dest,
        PinWatch(dest.pid) as at_qemu,
        outgoing(first, uri, pin_all=False, timeout=limit) as sender,
        PinWatch(sender.process.pid) as to_qemu,
    ):
        sender.succeed()
        asked = chunks_in_trace(dest.stderr(), ASKED)
    # Chunks in a row are asked for at once.
    assert 1 <= asked <= data
    check("outgoing to QEMU", to_qemu, data, memory)
    check("QEMU", at_qemu, data, memory)

    with (
        Incoming(second, timeout=limit) as incoming,
        PinWatch(incoming.process.pid) as into_second,
        outgoing(first, incoming.uri, pin_all=False, timeout=limit) as sender,
        PinWatch(sender.process.pid) as to_second,
    ):
        sender.succeed()
        incoming.succeed()
    check("outgoing to ours", to_second, data, memory)
    check("incoming from ours", into_second, data, memory)


def seconds(memory: int) -> float:
    """A backstop for one leg: every chunk takes a question, an answer and several looks."""
    return patience(60 + memory / 4)


def qemu(memory: int, name: str, event: str, **options: object) -> Qemu:
    """A QEMU with an idle guest that tells of one kind of event."""
    return Qemu(
        memory_mib=memory, name=name, extra=["-trace", event], timeout=seconds(memory), **options
    )


def check(who: str, watch: PinWatch, chunks: int, memory: int) -> None:
    """Compare what was pinned with the number of chunks asked for, of ``memory`` of them."""
    shown = (
        f"{who}: at most {watch.pinned / MIB:.1f} MiB pinned and {watch.registered / MIB:.1f} MiB "
        f"registered, {chunks} chunks asked for, {memory} MiB of guest RAM"
    )
    print(shown)
    assert watch.pinned <= chunks * MIB + BESIDE, shown
    assert watch.registered <= chunks * MIB + BESIDE, shown
    # A measurement that saw too little saw nothing; the chunks of ROMs are shorter than others.
    assert watch.pinned >= chunks * MIB // 2, shown
    assert watch.registered >= chunks * MIB // 2, shown
    # What is zero was not pinned, and is far more.
    assert (memory - chunks) * MIB > 3 * watch.pinned, shown
