# SPDX-License-Identifier: Apache-2.0
"""Dirty trackers: what they find, and that they lose no write."""

import errno
import os
import platform
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import pytest
import writer_kit
from writer_kit import PAGE, LostWrite, Race

from rdma_mig import _dirty
from rdma_mig.errors import HostError
from rdma_mig.memory import DirtyBitmap, RamBlock
from rdma_mig.memory.dirty import (
    ExplicitMarks,
    PagemapScan,
    SoftDirty,
    UffdWriteProtect,
    choose_tracker,
)
from rdma_mig.memory.ram import GuestRam

PAGES = 512
EXCHANGES = 1_000_000


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    return writer_kit.build(tmp_path_factory.mktemp("writer"))


@pytest.fixture
def ram():
    with GuestRam([RamBlock("rom", 70 * PAGE), RamBlock("ram", PAGES * PAGE)]) as guest:
        yield guest


# The trackers that this kernel has; test_kernel_has_what_its_version_promises says which those must
# be.
TRACKERS = [kind for kind in (PagemapScan, UffdWriteProtect, SoftDirty) if not kind.unsupported()]
# The kernel of the lab (Debian 12's) is older than that of most machines, and has soft-dirty bits:
# what needs root runs there.
CELLS = [
    pytest.param(kind, id=kind.__name__ + ("-in-lab" if marks else ""), marks=marks)
    for kind in TRACKERS
    for marks in ([], [pytest.mark.root])
    if marks or kind is not SoftDirty
]


@pytest.fixture(params=CELLS)
def tracker(request, ram):
    with request.param(ram) as tracker:
        yield tracker


def harvest(tracker, index=1):
    """Numbers of the pages that are found."""
    pages = [70, PAGES][index]
    bitmap = DirtyBitmap(pages)
    count = tracker.harvest(index, bitmap)
    numbers = [page for page in range(pages) if bitmap[page]]
    assert count == len(numbers)
    return numbers


def write(ram, page, data=b"x", index=1):
    with ram[index].memory.view() as view:
        view[page * PAGE : page * PAGE + len(data)] = data


def test_kernel_s_trackers_find_what_is_written(ram, tracker):
    write(ram, 3)
    tracker.start()
    assert harvest(tracker) == harvest(tracker, 0) == [], "what was written before does not count"
    write(ram, 3)
    write(ram, 7)
    write(ram, 63, bytes(2 * PAGE))
    write(ram, PAGES - 1)
    write(ram, 69, b"y", 0)
    assert harvest(tracker) == [3, 7, 63, 64, PAGES - 1]
    assert harvest(tracker) == []
    assert harvest(tracker, 0) == [69]
    write(ram, 3)
    assert harvest(tracker) == [3]
    bitmap = DirtyBitmap(PAGES)
    bitmap.set(5)
    write(ram, 6)
    assert tracker.harvest(1, bitmap) == 1
    assert bitmap[5], "a bitmap is added to"
    assert bitmap[6]


def test_reading_is_not_writing(ram, tracker):
    tracker.start()
    with ram[1].memory.view() as view:
        assert not any(view)
    assert harvest(tracker) == []


def test_writes_of_the_kernel_on_our_behalf_are_found(ram, tracker):
    """As read(2) into RAM, which is how an engine may load it."""
    tracker.start()
    with open("/dev/zero", "rb", buffering=0) as zeros, ram[1].memory.view() as view:
        assert zeros.readinto(view[10 * PAGE : 12 * PAGE]) == 2 * PAGE
    assert harvest(tracker) == [10, 11]


def test_memory_cannot_go_while_it_is_tracked_and_can_afterwards(ram, tracker):
    tracker.start()
    with pytest.raises(BufferError, match="held by a dirty tracker"):
        ram.close()
    with pytest.raises(ValueError, match="started already"):
        tracker.start()
    before = len(os.listdir("/proc/self/fd"))
    tracker.stop()
    tracker.stop()
    assert len(os.listdir("/proc/self/fd")) < before
    assert threading.active_count() == 1
    write(ram, 1)
    with pytest.raises(ValueError, match="not started"):
        harvest(tracker)
    tracker.start()
    write(ram, 2)
    assert harvest(tracker) == [2]
    tracker.stop()
    ram.close()


def test_marks_are_found_once(ram):
    marks = ExplicitMarks(ram)
    marks.mark(1, 3)
    marks.start()
    assert harvest(marks) == []
    marks.mark(1, 60, 10)
    marks.mark(1, 0, 0)
    marks.mark(0, 69)
    assert harvest(marks) == list(range(60, 70))
    assert harvest(marks) == []
    assert harvest(marks, 0) == [69]
    marks.mark(1, 0, PAGES)
    assert len(harvest(marks)) == PAGES
    for first, count in [(PAGES, 1), (0, PAGES + 1), (-1, 1), (5, -1), (1 << 64, 1)]:
        with pytest.raises(IndexError):
            marks.mark(1, first, count)
    with pytest.raises(IndexError):
        marks.mark(0, 70)
    marks.stop()


def test_marks_in_a_bitmap_of_the_owner_s(ram):
    words = [memoryview(array("Q", bytes(16))), memoryview(array("Q", bytes(64)))]
    marks = ExplicitMarks(ram, words)
    words[1][1] = 1 << 5
    assert harvest(marks) == [69]
    assert not any(words[1])
    with pytest.raises(ValueError, match="bitmaps of"):
        ExplicitMarks(ram, words[:1])
    with pytest.raises(ValueError, match="bitmaps of"):
        ExplicitMarks(ram, words[::-1])


# Lost writes


def test_no_write_is_lost_by_explicit_marks(kit, ram):
    words = [memoryview(array("Q", bytes(16))), memoryview(array("Q", bytes(64)))]
    race = Race(kit, ram[1], words[1])
    race.run(ExplicitMarks(ram, words), EXCHANGES, EXCHANGES // 10)


def test_no_write_is_lost_by_the_kernel_s_trackers(kit, ram, tracker, request):
    # The lab's processor is emulated: one exchange of soft-dirty bits takes tens of milliseconds.
    exchanges = EXCHANGES // 1000 if request.node.get_closest_marker("root") else EXCHANGES
    Race(kit, ram[1]).run(tracker, exchanges, exchanges // 100)


class ReadThenClear(ExplicitMarks):
    """What the exchange is for: a mark between the two steps is gone."""

    def harvest(self, index, into):
        into.words[:] = self._words[index]
        self._words[index][:] = array("Q", bytes(8 * len(into.words)))
        return into.count()


class AfterReading(ExplicitMarks):
    """Reports only what the harvest before has found: the copy is older than the mark."""

    late = None

    def harvest(self, index, into):
        if self.late is not None:
            into.words[:] = self.late.words
        self.late = DirtyBitmap(into.pages)
        super().harvest(index, self.late)
        return into.count()


@pytest.mark.parametrize("broken", [ReadThenClear, AfterReading])
def test_the_race_finds_trackers_that_lose_writes(kit, ram, broken):
    words = [memoryview(array("Q", bytes(16))), memoryview(array("Q", bytes(64)))]
    with pytest.raises(LostWrite):
        Race(kit, ram[1], words[1]).run(broken(ram, words), EXCHANGES, EXCHANGES)


class SoftDirtyWhileWriting(SoftDirty):
    """The kernel's bits without anybody who stops the writer."""

    atomic = True


if SoftDirty in TRACKERS:

    @pytest.mark.root
    def test_soft_dirty_loses_writes_where_writers_are_not_stopped(kit, ram):
        """So that it is known what stopping them is for."""
        with SoftDirtyWhileWriting(ram) as tracker, pytest.raises(LostWrite):
            Race(kit, ram[1]).run(tracker, EXCHANGES, EXCHANGES)


def test_a_userfaultfd_that_breaks_fails_the_next_harvest():
    """As nobody lets writes through any more; RAM is unprotected by then."""
    broken, sender = os.pipe()
    os.write(sender, b"no event")
    faults = _dirty.WriteFaults(broken, [(PAGE, PAGE, array("Q", [1]))], PAGE)
    assert not faults.serving
    assert faults.serve(sender) == -errno.EIO
    assert faults.serving
    assert faults.take(0, array("Q", [0])) == -errno.EIO
    os.close(broken)
    os.close(sender)


# Which


def version():
    return tuple(int(part) for part in platform.release().split(".")[:2])


@pytest.mark.parametrize("where", ["here", pytest.param("in the lab", marks=pytest.mark.root)])
def test_kernel_has_what_its_version_promises(ram, where):
    """A tracker that stops working would only be missing from the tests above."""
    scan, uffd = PagemapScan.unsupported(), UffdWriteProtect.unsupported()
    if "User Mode Linux" in Path("/proc/cpuinfo").read_text():
        assert "lacks this kind" in scan
        assert "lacks this kind" in uffd
        return
    if version() >= (6, 7):
        assert scan == ""
        assert isinstance(choose_tracker(ram).tracker, PagemapScan)
    else:
        assert "lacks this kind" in scan
    if version() >= (5, 19) and os.access("/dev/userfaultfd", os.W_OK):
        assert uffd == ""


def test_next_best_is_taken_and_the_reasons_are_told(ram, monkeypatch):
    lacking = lambda reason: classmethod(lambda cls: reason)  # noqa: E731
    monkeypatch.setattr(PagemapScan, "unsupported", lacking("too old"))
    monkeypatch.setattr(UffdWriteProtect, "unsupported", lacking(""))
    choice = choose_tracker(ram)
    assert isinstance(choice.tracker, UffdWriteProtect)
    assert choice.refused == {"PagemapScan": "too old"}
    with pytest.raises(HostError, match="cannot be registered with an RDMA device"):
        choose_tracker(ram, registered=True)
    monkeypatch.setattr(UffdWriteProtect, "unsupported", lacking("forbidden"))
    monkeypatch.setattr(SoftDirty, "unsupported", lacking(""))
    choice = choose_tracker(ram, can_stop=True)
    assert isinstance(choice.tracker, SoftDirty)
    assert choice.refused == {"PagemapScan": "too old", "UffdWriteProtect": "forbidden"}
    with pytest.raises(HostError, match="UffdWriteProtect: forbidden; SoftDirty: the writers"):
        choose_tracker(ram)
    monkeypatch.setattr(SoftDirty, "unsupported", lacking("none"))
    with pytest.raises(HostError, match=r"SoftDirty: none.*mark what is written explicitly"):
        choose_tracker(ram, can_stop=True)


def test_a_kernel_that_tells_nothing_is_found_out(monkeypatch):
    monkeypatch.setattr(_dirty, "read_soft_dirty", lambda *_: 0)
    assert "does not tell which pages were written" in SoftDirty.unsupported()


WITHOUT_PRIVILEGES = """
import ctypes, os
from rdma_mig.memory.dirty import PagemapScan, UffdWriteProtect
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
# As a process has it that was started by that user: its files in /proc are its own.
PR_SET_DUMPABLE = 4
assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
print(PagemapScan.unsupported(), UffdWriteProtect.unsupported(), sep="|")
"""


def test_users_without_privileges():
    """The best one is for everybody; one that would break read(2) into RAM is not offered."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PRIVILEGES], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    scan, uffd = done.stdout.strip().split("|")
    if version() >= (6, 7):
        assert scan == ""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "0":
        assert "not allowed to this user: set vm.unprivileged_userfaultfd=1" in uffd
