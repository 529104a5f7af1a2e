# SPDX-License-Identifier: Apache-2.0
"""Guest memory in huge pages, on this very kernel."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.huge_pages import huge_pages_set_aside

from rdma_mig.errors import HostError
from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.memory import guest as guest_module
from rdma_mig.memory.meminfo import available_memory, free_huge_pages, huge_page_size
from rdma_mig.memory.ram import GuestRam, require_memory

MIB = 1 << 20
SIZE = huge_page_size()


def test_kernel_without_huge_pages_says_so(monkeypatch):
    monkeypatch.setattr(guest_module, "huge_page_size", lambda: 0)
    with pytest.raises(HostError, match="no huge pages") as caught:
        GuestMemory(4 * MIB, "pc.ram", huge_pages=True)
    assert caught.value.remedy


def test_what_is_in_huge_pages_is_not_taken_from_what_is_available():
    within = available_memory() // SIZE * SIZE + SIZE
    require_memory([within, 131072], huge_pages=True)
    for lengths, huge_pages in [([within], False), ([within + 4096], True)]:
        with pytest.raises(HostError, match="MiB available"):
            require_memory(lengths, huge_pages=huge_pages)


@pytest.mark.root
def test_memory_in_huge_pages():
    free = free_huge_pages()
    with huge_pages_set_aside(4), GuestMemory(4 * SIZE, "pc.ram", huge_pages=True) as memory:
        assert memory.huge
        assert free_huge_pages() == free, "all are allotted, and none is taken"
        assert memory.next_data(0) is None
        assert list(memory.data_extents(memory.length, MIB)) == []
        with memory.view() as view:
            view[SIZE + 5] = 7
            assert os.pread(memory.fd, 2, SIZE + 5) == b"\7\0"
            assert os.fstat(memory.fd).st_blocks * 512 == SIZE
        assert memory.next_data(0) == 0
        assert memory.next_data(3 * SIZE) == 3 * SIZE
        assert memory.next_data(4 * SIZE) is None
        assert memory.is_zero(0, SIZE)
        assert not memory.is_zero(SIZE, SIZE)
        memory.fill(3 * SIZE, memoryview(b"\0" * 4096 + b"x" * 4096))
        memory.populate()
        assert os.fstat(memory.fd).st_blocks * 512 == 4 * SIZE
        with GuestMemory.adopt(os.dup(memory.fd), "pc.ram") as adopted, adopted.view() as view:
            assert view[SIZE + 5] == 7
            assert view[3 * SIZE + 4096] == ord("x")
            assert adopted.next_data(SIZE) == SIZE
    assert free_huge_pages() == free


@pytest.mark.root
def test_blocks_that_are_no_whole_number_of_them_stay_out():
    blocks = [RamBlock("pc.ram", 2 * SIZE), RamBlock("pc.bios", 262144), RamBlock("x", SIZE + 4096)]
    with huge_pages_set_aside(2), GuestRam(blocks, huge_pages=True) as ram:
        assert [guest.memory.huge for guest in ram] == [True, False, False]
    with GuestRam(blocks) as ram:
        assert not any(guest.memory.huge for guest in ram)


@pytest.mark.root
def test_too_few_are_refused_at_once():
    blocks = [RamBlock("pc.ram", 2 * SIZE), RamBlock("dimm0", 2 * SIZE)]
    with huge_pages_set_aside(3):
        before = len(os.listdir("/proc/self/fd"))
        free = free_huge_pages()
        with pytest.raises(HostError, match=r"'dimm0' .* too few huge pages .*, 1 of") as caught:
            GuestRam(blocks, huge_pages=True)
        assert "vm.nr_hugepages" in caught.value.remedy
        assert free_huge_pages() == free
        assert len(os.listdir("/proc/self/fd")) == before
