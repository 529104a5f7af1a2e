# SPDX-License-Identifier: Apache-2.0
"""XBZRLE in live migrations from and to a real QEMU, through the header's functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from channel_kit import assert_runs_on, assert_same_memory
from harness import Guest, Qemu, differences, fill_random, read_blocks
from support import MIB

import rdma_mig.migration as header
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.migration.guests import SnapshotGuest

pytestmark = pytest.mark.usefixtures("current")

PAGE = 4096
# It changes four bytes of a page, over and over.
CHANGING = Guest.dirtying(4, pause=0)


class Altered(SnapshotGuest):
    """A snapshot that is sent with bytes that are wrong, and becomes right while it is sent.

    It is the tracker of its own writes.

    Attributes:
        pages: numbers of the pages of the first block that are wrong at first.
    """

    atomic = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.tracker = self
        self._harvests = 0
        with self.ram[0].memory.view() as view:
            self._right = bytes(view)
            self.pages = [
                page
                for page in range(len(view) // PAGE)
                if any(self._right[page * PAGE : (page + 1) * PAGE])
            ][:2000]
            for page in self.pages:
                for byte in range(page % 50, PAGE, 500):
                    view[page * PAGE + byte] ^= 0x5A

    def start(self) -> None:
        """It knows what it does."""

    def harvest(self, index: int, into: DirtyBitmap) -> int:
        """Behind the first pass all is sent once more, which is what the cache learns it by."""
        if index:
            return 0
        self._harvests += 1
        if self._harvests not in (2, 3):
            return 0
        with self.ram[0].memory.view() as view:
            for page in self.pages:
                into.set(page)
                if self._harvests == 3:
                    at = page * PAGE
                    view[at : at + PAGE] = self._right[at : at + PAGE]
        return len(self.pages)


def test_guest_comes_from_a_qemu_that_sends_what_has_changed(tmp_path: Path) -> None:
    with (
        Qemu(guest=CHANGING, name="source") as source,
        SnapshotGuest(tmp_path / "kept") as guest,
    ):
        fill_random(source.memory_path, 1, 16 * MIB, 16 * MIB)
        source.wait_heartbeat(3)
        source.set_capability("xbzrle")
        source.set_parameter("max-bandwidth", 20 * MIB)
        source.set_parameter("downtime-limit", 5)
        header.migrate_set_guest(guest)
        source.migrate(header.unix_start_incoming_migration(f"{tmp_path}/socket"))
        told = source.wait_migration()["xbzrle-cache"]
        state = header.migrate_get_current()
        state.migration.wait(60)
        assert_same_memory(tmp_path / "kept", bytes(source.memory()[:]))
    # It counts the pages that it found unchanged too, which it does not send.
    assert told["pages"] >= state.page_reader.counters.xbzrle_pages > 1000
    assert state.page_reader.decoded_size == 0


def test_qemu_takes_what_has_changed(tmp_path: Path) -> None:
    with Qemu(guest=CHANGING, name="source") as source, SnapshotGuest(tmp_path / "kept") as guest:
        fill_random(source.memory_path, 1, 32 * MIB, 8 * MIB)
        source.wait_heartbeat(3)
        header.migrate_set_guest(guest)
        source.migrate(header.unix_start_incoming_migration(f"{tmp_path}/socket"))
        source.wait_migration()
        header.migrate_get_current().migration.wait(60)
        blocks = {name: bytes(data[:]) for name, data in read_blocks(source).items()}
    uri = f"unix:{tmp_path}/qemu"
    with (
        Qemu(guest=CHANGING, name="destination", paused=True, incoming=uri) as destination,
        Altered(tmp_path / "kept") as guest,
    ):
        header.migrate_set_guest(guest)
        header.migrate_set_capability("xbzrle")
        header.migrate_get_current().max_downtime = 0
        header.unix_start_outgoing_migration(header.migrate_get_current(), uri.partition(":")[2])
        header.migrate_get_current().migration.wait(60)
        destination.wait_status("paused")
        assert differences(blocks, read_blocks(destination)) == []
        destination.cont()
        assert_runs_on(destination)
        assert header.xbzrle_mig_pages_transferred() == len(guest.pages) > 1000
        assert header.xbzrle_mig_pages_cache_miss() == len(guest.pages)
        assert header.xbzrle_mig_bytes_transferred() < len(guest.pages) * 200
