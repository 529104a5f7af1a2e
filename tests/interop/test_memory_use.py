# SPDX-License-Identifier: Apache-2.0
"""Either end needs the guest's RAM once, and little more."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Qemu, fill_random
from support import MIB, OVERHEAD, Incoming, PeakMemory, outgoing, patience

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]


@pytest.mark.parametrize("memory", [64, pytest.param(256, marks=pytest.mark.full)])
def test_peak_is_guest_ram_once(memory: int, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        Incoming(first) as incoming,
        PeakMemory(incoming.process.pid) as peak,
        Qemu(paused=True, memory_mib=memory, name="source", timeout=patience(60)) as qemu,
    ):
        # All of it: a zero page might be spared where a page with data is not.
        fill_random(qemu.memory_path, 3, 0, qemu.memory_size)
        qemu.set_capability("rdma-pin-all")
        qemu.set_parameter("max-bandwidth", 0)
        qemu.migrate(incoming.uri)
        qemu.wait_migration()
        ram = incoming.succeed().event("completed")["bytes"]
    check("incoming from a QEMU", peak, ram)

    with Incoming(second) as incoming, PeakMemory(incoming.process.pid) as destination:
        with (
            outgoing(first, incoming.uri) as sender,
            PeakMemory(sender.process.pid) as source,
        ):
            sender.succeed()
        incoming.succeed()
    check("incoming from ours", destination, ram)
    # Zeros of a snapshot, as in ROMs, have no memory at its source.
    check("outgoing", source, ram, least=memory * MIB)


def check(who: str, peak: PeakMemory, ram: int, least: int | None = None) -> None:
    shown = (
        f"{who}: {peak.resident / MIB:.1f} MiB resident, {peak.shared / MIB:.1f} MiB in memory "
        f"files, for {ram / MIB:.1f} MiB of guest RAM"
    )
    print(shown)
    # A measurement that saw too little saw nothing.
    least = ram if least is None else least
    assert least <= peak.shared <= ram + MIB, shown
    assert least < peak.resident <= ram + OVERHEAD, shown
