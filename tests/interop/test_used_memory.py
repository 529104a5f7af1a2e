# SPDX-License-Identifier: Apache-2.0
"""A QEMU whose RAM lies in a file that was used before gets zeros where there are to be zeros.

Nothing tells a source what is in such a file; that zeros are left out is an option's doing only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Qemu, differences, fill_random, free_port, snapshot_blocks
from matrix import MODES
from support import MIB, Incoming, outgoing, patience, rdma_uri

pytestmark = [pytest.mark.rdma, pytest.mark.qemu, pytest.mark.deadline(240)]

#: More than the blocks that count as all zero where that is asked for.
MEMORY = 80
#: What of RAM holds data: nothing, every other MiB, all.
CONTENTS = {"idle": range(0), "half": range(0, MEMORY, 2), "random": range(MEMORY)}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("mode", MODES)
def test_memory_that_was_used_is_what_the_source_had(mode: str, content: str, tmp_path: Path):
    kept, limit = tmp_path / "kept", patience(60)
    with Incoming(kept) as incoming, qemu("source") as source:
        for number in CONTENTS[content]:
            fill_random(source.memory_path, number, number * MIB, MIB)
        source.set_parameter("max-bandwidth", 0)
        source.migrate(incoming.uri)
        source.wait_migration()
        incoming.succeed()
    uri = rdma_uri(free_port())
    with qemu("destination", incoming=uri) as there:
        with there.memory_path.open("r+b") as memory:
            for _ in range(MEMORY):
                memory.write(b"\xff" * MIB)
        with outgoing(kept, uri, pin_all=mode == "pin-all", timeout=limit) as sender:
            sender.succeed()
        there.wait_migration()
        sent = {"pc.ram": snapshot_blocks(kept)["pc.ram"]}
        assert differences(sent, {"pc.ram": there.memory()}) == []


def qemu(name: str, **options: object) -> Qemu:
    """A QEMU whose guest does not run."""
    return Qemu(memory_mib=MEMORY, paused=True, name=name, timeout=patience(60), **options)
