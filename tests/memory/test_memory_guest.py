# SPDX-License-Identifier: Apache-2.0
"""Guest memory on this very kernel."""

import contextlib
import errno
import os
import resource
import subprocess
import sys

import pytest

from rdma_mig import _pages
from rdma_mig.errors import HostError, MigrationCancelled
from rdma_mig.memory import GuestMemory

MIB = 1 << 20


def allocated(memory):
    return os.fstat(memory.fd).st_blocks * 512


@contextlib.contextmanager
def limited(what, soft):
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_fresh_memory_is_zero_aligned_shared_and_takes_nothing():
    with GuestMemory(5 * MIB + 100, "pc.ram") as memory:
        assert memory.length == 5 * MIB + 100
        assert memory.address % 4096 == 0
        assert allocated(memory) == 0
        with memory.view() as view:
            assert len(view) == memory.length
            assert not view.readonly
            view[MIB] = 7
            assert _pages.address_of(view) == memory.address
        assert os.pread(memory.fd, 1, MIB) == b"\x07"
        os.pwrite(memory.fd, b"\x09", 5)
        assert memory.view()[5] == 9
    assert memory.closed
    assert memory.fd == -1


def test_nobody_can_resize_it():
    with GuestMemory(MIB, "pc.ram") as memory:
        for size in (0, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, size)
        assert not os.get_inheritable(memory.fd)


def test_it_stays_out_of_core_dumps():
    with GuestMemory(MIB, "pc.ram") as memory, open("/proc/self/smaps", encoding="ascii") as smaps:
        lines = iter(smaps)
        for line in lines:
            if line.startswith(f"{memory.address:x}-"):
                assert "pc.ram" in line
                break
        flags = next(line for line in lines if line.startswith("VmFlags"))
        assert "dd" in flags.split()


@pytest.mark.parametrize("kernel", ["new", "before 5.14"])
def test_populate(monkeypatch, kernel):
    if kernel != "new":
        monkeypatch.setattr(_pages, "populate_write", lambda part: -errno.EINVAL)
    with GuestMemory(5 * MIB + 100, "pc.ram") as memory:
        with memory.view() as view:
            view[4 * MIB] = 3
        memory.populate(step=MIB)
        assert allocated(memory) == 5 * MIB + 4096
        with memory.view() as view:
            assert view[4 * MIB] == 3
            assert _pages.is_zero(view[: 4 * MIB])


def test_populate_can_be_cancelled():
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 3

    with GuestMemory(8 * MIB, "pc.ram") as memory:
        with pytest.raises(MigrationCancelled, match=r"pc\.ram"):
            memory.populate(stop, step=MIB)
        assert allocated(memory) == 2 * MIB
    with GuestMemory(MIB, "x") as memory, pytest.raises(ValueError, match="page size"):
        memory.populate(step=1000)


def test_more_memory_than_there_is():
    with open("/proc/meminfo", encoding="ascii") as lines:
        sizes = {key: int(rest.split()[0]) for key, rest in (line.split(":") for line in lines)}
    length = 2 * (sizes["MemTotal"] + sizes["SwapTotal"]) * 1024
    with GuestMemory(length, "pc.ram") as memory:
        with pytest.raises(
            HostError, match=r"pc\.ram.* needs .* of memory and this host"
        ) as caught:
            memory.populate()
        assert caught.value.remedy
        assert caught.value.exit_status == 3
        assert allocated(memory) == 0


def test_memory_that_runs_out_while_populating(monkeypatch):
    # EFAULT: what the kernel says instead of the SIGBUS of a touch.
    monkeypatch.setattr(_pages, "populate_write", lambda part: -errno.EFAULT)
    with (
        GuestMemory(3 * MIB, "pc.ram") as memory,
        pytest.raises(HostError, match=r"3 MiB of memory.*Cannot allocate memory.*cgroup"),
    ):
        memory.populate()


@pytest.mark.parametrize(
    ("what", "soft", "remedy"),
    [
        (resource.RLIMIT_FSIZE, MIB, "ulimit -f"),
        (resource.RLIMIT_NOFILE, 3, "ulimit -n"),
        (resource.RLIMIT_AS, 1 << 20, "ulimit -v"),
    ],
    ids=["file size", "descriptors", "address space"],
)
def test_limits_of_this_process(what, soft, remedy):
    before = os.listdir("/proc/self/fd")
    with limited(what, soft), pytest.raises(HostError) as caught:
        GuestMemory(64 * MIB, "pc.ram")
    assert remedy in str(caught.value)
    assert "64 MiB" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_length_that_no_host_can_map():
    with pytest.raises(HostError):
        GuestMemory(1 << 62, "pc.ram")
    with pytest.raises(HostError):
        GuestMemory(1 << 70, "pc.ram")
    for length in (0, -5):
        with pytest.raises(ValueError, match=r"pc\.ram"):
            GuestMemory(length, "pc.ram")


@pytest.mark.parametrize("name", ["/rom@etc/acpi/tables", "a\0b", "x" * 255, "\udc80"])
def test_names(name):
    GuestMemory(4096, name).close()


def test_held_memory_stays():
    memory = GuestMemory(MIB, "pc.ram")
    first = memory.hold("memory region 0x17")
    with memory.hold("a copy"):
        with pytest.raises(BufferError, match=r"memory region 0x17, a copy"):
            memory.close()
        assert not memory.closed
    first.release()
    first.release()
    view = memory.view()
    with pytest.raises(BufferError, match="view"):
        memory.close()
    view[0] = 1
    view.release()
    memory.close()
    memory.close()
    for call in (memory.view, memory.hold, lambda: memory.next_data(0), memory.populate):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_holes_are_found():
    with GuestMemory(8 * MIB, "pc.ram") as memory:
        assert memory.next_data(0) is None
        with memory.view() as view:
            view[5 * MIB + 1] = 1
        start = memory.next_data(0)
        assert start is not None
        assert start <= 5 * MIB + 1
        assert memory.next_data(5 * MIB) == 5 * MIB
        assert memory.next_data(8 * MIB) is None
        assert memory.next_data(1 << 60) is None


def test_forgotten_memory_warns_and_is_given_back():
    forgotten = [GuestMemory(MIB, "pc.ram")]
    fd = forgotten[0].fd
    with pytest.warns(ResourceWarning, match=r"pc\.ram"):
        forgotten.clear()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_populating_leaves_other_threads_running():
    code = """
import threading, time, sys
from rdma_mig.memory import GuestMemory
sys.setswitchinterval(0.0005)
memory = GuestMemory(512 << 20, "pc.ram")
worker = threading.Thread(target=lambda: memory.populate(step=512 << 20))
worst, last = 0.0, time.monotonic()
worker.start()
begun = time.monotonic()
while worker.is_alive():
    time.sleep(0.001)
    now = time.monotonic()
    worst, last = max(worst, now - last), now
took = time.monotonic() - begun
memory.close()
print(worst, took)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    worst, took = map(float, out.split())
    assert worst < took * 0.8, f"one step of {took:.3f} s kept everybody waiting for {worst:.3f} s"
