# SPDX-License-Identifier: Apache-2.0
"""RAM that arrives in huge pages of the destination."""

from __future__ import annotations

from pathlib import Path

import pytest
import rdma_command as command
import rdma_kit as kit
import snapshot_kit
from harness import differences, snapshot_blocks
from harness.huge_pages import huge_pages_set_aside

from rdma_mig.errors import HostError
from rdma_mig.memory import RamBlock
from rdma_mig.memory.meminfo import free_huge_pages, huge_page_size
from rdma_mig.snapshot import Snapshot

pytestmark = [pytest.mark.rdma, pytest.mark.root]

PAGES = 4
BLOCKS = (
    RamBlock("pc.ram", PAGES * (huge_page_size() or 2 * kit.MIB)),
    RamBlock("pc.bios", 262144),
)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A snapshot with data in two of the huge pages, and in the ROM, which is in none."""
    with snapshot_kit.guest(BLOCKS) as memories:
        for memory in memories:
            with memory.view() as view:
                view[4096:12288] = snapshot_kit.noise(8192)
                view[-4096:] = snapshot_kit.noise(4096, 2)
        return snapshot_kit.keep(tmp_path / "kept", memories, BLOCKS)


def check_equal(kept: Path, arrived: Path) -> None:
    with Snapshot.open(arrived) as snapshot:
        snapshot.verify()
    assert not differences(snapshot_blocks(kept), snapshot_blocks(arrived))


@pytest.mark.parametrize("options", [["--rdma-pin-all"], []], ids=["pin-all", "dynamic"])
def test_ram_arrives_in_huge_pages(options: list[str], kept: Path, room: Path):
    before = kit.resources() | {"ctx": 1 << 30}
    with huge_pages_set_aside(PAGES):
        free = free_huge_pages()
        with kit.incoming(room / "vm", huge_pages=True) as into:
            out = command.run("outgoing", kept, into.uri, *options)
            assert out.returncode == 0, out.stderr
            into.succeed()
            assert free_huge_pages() == free - PAGES
        assert free_huge_pages() == free
    check_equal(kept, room / "vm")
    kit.settle(before)


def test_too_few_leave_the_machine_to_its_source(kept: Path, room: Path):
    with huge_pages_set_aside(PAGES - 1):
        free = free_huge_pages()
        with kit.incoming(room / "vm", huge_pages=True) as into:
            out = command.run("outgoing", kept, into.uri)
            assert out.returncode
            error = into.fail(HostError, "too few huge pages")
            assert "vm.nr_hugepages" in (error.remedy or "")
        assert free_huge_pages() == free
    assert not list(room.iterdir())


def test_command(kept: Path, room: Path):
    uri = f"rdma:{kit.device()[1]}:0"
    with (
        huge_pages_set_aside(PAGES),
        command.incoming(uri, room / "vm", "--huge-pages") as into,
    ):
        out = command.run("outgoing", kept, into.uri, "--rdma-pin-all")
        assert out.returncode == 0, out.stderr
        into.events()
    check_equal(kept, room / "vm")
