# SPDX-License-Identifier: Apache-2.0
"""The hooks of migration.h with a small engine: what they write, what they refuse, what is left."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import warnings
from collections.abc import Callable

import pytest
import rdma_kit as kit
from hooks_kit import (
    CHUNK,
    PAGE,
    RAM,
    Engine,
    a_round,
    begin,
    digests,
    finish,
    pages,
    run,
    sent_packets,
)

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import LocalProtocolError, MigrationError, PeerGone, RemoteProtocolError
from rdma_mig.memory import DirtyBitmap
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration import ram_control
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_BLOCK_REG,
    RAM_CONTROL_FINISH,
    RAM_CONTROL_HOOK,
    RAM_CONTROL_ROUND,
    RAM_CONTROL_SETUP,
    RAM_SAVE_CONTROL_DELAYED,
    RAM_SAVE_CONTROL_NOT_SUPP,
    ram_control_after_iterate,
    ram_control_before_iterate,
    ram_control_load_hook,
    ram_control_save_page,
    ram_control_save_pages,
)
from rdma_mig.migration.rdma import rdma_start_incoming_migration
from rdma_mig.migration.state import Migration, migrate_get_current
from rdma_mig.wire.control import ControlType
from rdma_mig.wire.stream import RAM_SAVE_FLAG_HOOK, encode_section_part

pytestmark = pytest.mark.rdma


def test_when_pages_are_merged_and_when_they_are_written(engine, ram):
    seen = {}

    def save(file, counts):
        begin(file)

        def each():
            pages(file, 0, 100)
            assert counts.new() == (0, 0), "the run is pending"
            pages(file, 101, 1)
            assert counts.new() == (1, 100 * PAGE), "a gap"
            pages(file, 100, 1)
            assert counts.new() == (1, PAGE), "backwards"
            pages(file, 0, 1, block=1)
            assert counts.new() == (1, PAGE), "another block"
            pages(file, 1, CHUNK - 1, block=1)
            assert counts.new() == (0, 0), "up to the chunk's border"
            pages(file, 2 * CHUNK - 1, 1)
            assert counts.new() == (1, kit.MIB), "a whole chunk in one"
            pages(file, 2 * CHUNK, 1)
            assert counts.new() == (1, PAGE), "over the chunk's border"
            file.put(b"")
            file.flush()
            assert counts.new() == (0, 0), "no stream byte, no write"
            pages(file, 2 * CHUNK + 1, 1)
            assert counts.new() == (0, 0), "still the same run"

        a_round(file, each)
        assert counts.new() == (1, 2 * PAGE), "the end of the phase, once"
        finish(
            file, lambda: [pages(file, 0, b.length // PAGE, i) for i, b in enumerate(kit.BLOCKS)]
        )
        seen["writes"] = counts.new()

    run(engine.told()["uri"], ram, save)
    told = engine.told()
    assert told["digests"] == digests(ram)
    assert told["hooks"] == 3
    # 3 chunks and 8 KiB, 1 chunk, 128 KiB: each of them in one write.
    assert seen["writes"] == (6, ram.total)


def test_stream_bytes_go_behind_the_pages_that_were_offered_before_them(ram):
    """A run that is pending is written when stream bytes are sent, once."""
    seen = []

    def save(file, counts):
        begin(file)
        file.put(encode_section_part(kit.RAM_ID))
        ram_control_before_iterate(file, RAM_CONTROL_ROUND)
        pages(file, 0, 3)
        seen.append(counts.new())
        file.put(b"stream bytes")
        seen.append(counts.new())
        for _ in range(2):
            file.flush()
            seen.append(counts.new())
        ram_control_after_iterate(file, RAM_CONTROL_ROUND)
        seen.append(counts.new())

    with kit.RawListener() as listener:
        source = kit.Worker(lambda: run(listener.uri, ram, save))
        peer = listener.accept()
        kit.until("in the last phase", kit.act_as_destination(peer))
        peer.ready()
        assert peer.expect(ControlType.QEMU_FILE) == b"stream bytes"
        # RC keeps the order: what was written before a message is there when that arrives.
        with peer.ram[0].memory.view() as arrived, ram[0].memory.view() as sent:
            assert arrived[: 3 * PAGE] == sent[: 3 * PAGE]
            assert not any(arrived[3 * PAGE : 4 * PAGE])
        peer.ready()
        peer.expect(ControlType.REGISTER_FINISHED)
        source.result()
    assert seen == [(0, 0), (0, 0), (1, 3 * PAGE), (0, 0), (0, 0)]


@pytest.mark.parametrize("pin_all", [True, False], ids=["pin-all", "dynamic"])
def test_page_by_page_and_in_bulk_the_same_bytes_arrive(ram, pin_all):
    """Every third page, and the last one of each block; the rest stays zero at the destination."""
    bitmaps = []
    with GuestRam(kit.BLOCKS) as wanted:
        for guest, other in zip(ram, wanted, strict=True):
            bitmap = DirtyBitmap.of_length(guest.block.length)
            count = guest.block.length // PAGE
            for page in {*range(0, count, 3), *range(40, min(count, 80)), count - 1}:
                bitmap.set(page)
                with guest.memory.view() as view, other.memory.view() as copy:
                    copy[page * PAGE : (page + 1) * PAGE] = view[page * PAGE : (page + 1) * PAGE]
            bitmaps.append(bitmap)
        expected = digests(wanted)

    def by_page(file):
        for guest, bitmap in zip(ram, bitmaps, strict=True):
            for page in range(len(bitmap)):
                if bitmap[page]:
                    pages(file, page, 1, guest.index)

    def in_bulk(file):
        for guest, bitmap in zip(ram, bitmaps, strict=True):
            sent = ctypes.c_int(0)
            result = ram_control_save_pages(file, guest.offset, bitmap, sent)
            assert result == RAM_SAVE_CONTROL_DELAYED
            assert sent.value == sum(bitmap[page] for page in range(len(bitmap)))

    engine = Engine(2)
    try:
        for way in (by_page, in_bulk):

            def save(file, _counts, way=way):
                begin(file)
                finish(file, lambda: way(file))

            run(engine.told()["uri"], ram, save, pin_all=pin_all)
            assert engine.told()["digests"] == expected
    finally:
        assert engine.close() == ""


def test_the_device_sent_what_was_counted(engine, ram):
    moved = {}

    def save(file, counts):
        begin(file)
        before = sent_packets()
        finish(file, lambda: [ram_control_save_pages(file, guest.offset) for guest in ram])
        moved["packets"] = None if before is None else sent_packets() - before
        moved["writes"], moved["bytes"] = counts.new()

    run(engine.told()["uri"], ram, save)
    assert engine.told()["digests"] == digests(ram)
    assert (moved["writes"], moved["bytes"]) == (len(kit.BLOCKS), ram.total)
    if moved["packets"] is not None:
        assert ram.total // 4096 <= moved["packets"] <= 2 * ram.total // 1024 + 200


# ---- what is refused ----


def refused(uri, ram, misuse, match):
    """Misuse in a phase raises, sticks to the file, and ends the migration."""
    seen = []

    def save(file, _counts):
        with pytest.raises(LocalProtocolError, match=match) as caught:
            misuse(file)
        assert file.error is caught.value
        for later in (
            lambda: ram_control_save_page(file, 0, 0, PAGE),
            lambda: ram_control_save_pages(file, 0),
            lambda: ram_control_before_iterate(file, RAM_CONTROL_ROUND),
            lambda: ram_control_after_iterate(file, RAM_CONTROL_ROUND),
            lambda: file.put(b"x"),
            file.flush,
        ):
            with pytest.raises(LocalProtocolError) as again:
                later()
            assert again.value is caught.value
        seen.append(caught.value)
        raise caught.value

    with pytest.raises(LocalProtocolError) as ended:
        run(uri, ram, save)
    assert seen == [ended.value]


def in_another_thread(call: Callable[[], None]) -> None:
    caught = []

    def work() -> None:
        try:
            call()
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise caught[0]


def within(file: QEMUFile, then: Callable[[], None]) -> None:
    begin(file)
    file.put(encode_section_part(kit.RAM_ID))
    ram_control_before_iterate(file, RAM_CONTROL_ROUND)
    then()


def after(file: QEMUFile, then: Callable[[], None]) -> None:
    within(file, lambda: ram_control_after_iterate(file, RAM_CONTROL_ROUND))
    then()


REFUSED = {
    "a page before setup": (lambda f: pages(f, 0, 1), "outside|not known"),
    "a page in setup": (
        lambda f: (f.put(kit.HEAD), ram_control_before_iterate(f, RAM_CONTROL_SETUP),
                   pages(f, 0, 1)), "outside|not known"),
    "a page before a phase": (lambda f: (begin(f), pages(f, 0, 1)), "outside"),
    "a page after a phase": (lambda f: after(f, lambda: pages(f, 0, 1)), "outside"),
    "all pages after a phase": (
        lambda f: after(f, lambda: ram_control_save_pages(f, 0)), "outside"),
    "a phase before setup": (
        lambda f: ram_control_before_iterate(f, RAM_CONTROL_ROUND), "before the one of setup"),
    "a second setup": (
        lambda f: (begin(f), ram_control_before_iterate(f, RAM_CONTROL_SETUP)), "second setup"),
    "setup within setup": (
        lambda f: (f.put(kit.HEAD), ram_control_before_iterate(f, RAM_CONTROL_SETUP),
                   ram_control_before_iterate(f, RAM_CONTROL_SETUP)), "second setup"),
    "an end of setup without a beginning": (
        lambda f: ram_control_after_iterate(f, RAM_CONTROL_SETUP), "did not begin"),
    "a second end of setup": (
        lambda f: (begin(f), ram_control_after_iterate(f, RAM_CONTROL_SETUP)), "did not begin"),
    "an end of setup in a round": (
        lambda f: within(f, lambda: ram_control_after_iterate(f, RAM_CONTROL_SETUP)),
        "did not begin"),
    "an end of a round in setup": (
        lambda f: (f.put(kit.HEAD), ram_control_before_iterate(f, RAM_CONTROL_SETUP),
                   ram_control_after_iterate(f, RAM_CONTROL_ROUND)), "did not begin"),
    "a phase within a phase": (
        lambda f: within(f, lambda: ram_control_before_iterate(f, RAM_CONTROL_FINISH)), "within"),
    "an end without a beginning": (
        lambda f: (begin(f), ram_control_after_iterate(f, RAM_CONTROL_ROUND)), "did not begin"),
    "a page of no block": (
        lambda f: within(f, lambda: ram_control_save_page(f, 4096, 0, PAGE)), "no RAM block"),
    "a page behind its block": (
        lambda f: within(f, lambda: ram_control_save_page(f, 0, RAM, PAGE)), "not within"),
    "a page over its block's end": (
        lambda f: within(f, lambda: ram_control_save_page(f, 0, RAM - PAGE, 2 * PAGE)),
        "not within"),
    "no bytes": (lambda f: within(f, lambda: ram_control_save_page(f, 0, 0, 0)), "not within"),
    "a page from another thread": (
        lambda f: within(f, lambda: in_another_thread(lambda: pages(f, 0, 1))), "thread"),
    "all pages from another thread": (
        lambda f: within(f, lambda: in_another_thread(lambda: ram_control_save_pages(f, 0))),
        "thread"),
    "an end from another thread": (
        lambda f: within(f, lambda: in_another_thread(
            lambda: ram_control_after_iterate(f, RAM_CONTROL_ROUND))), "thread"),
    "loading at a source": (
        lambda f: ram_control_load_hook(f, RAM_CONTROL_HOOK), "does not load"),
}  # fmt: skip


def test_misuse_raises_and_sticks_to_the_file(ram):
    engine = Engine(len(REFUSED))
    try:
        for misuse, match in REFUSED.values():
            refused(engine.told()["uri"], ram, misuse, match)
            assert "error" in engine.told()
        assert engine.told()["left"] <= 0
    finally:
        assert engine.close() == ""


def test_what_the_transport_meets_sticks_to_the_file(ram):
    """A destination that is gone fails the call that meets it, and every call behind that."""
    seen = []

    def offer_all(file):
        for page in range(0, RAM // PAGE, 2):
            ram_control_save_page(file, 0, page * PAGE, PAGE)
        ram_control_after_iterate(file, RAM_CONTROL_ROUND)

    def save(file, _counts):
        begin(file)
        file.put(encode_section_part(kit.RAM_ID))
        ram_control_before_iterate(file, RAM_CONTROL_ROUND)
        assert gone.wait(kit.patience(20))
        with pytest.raises(PeerGone) as caught:
            offer_all(file)
        assert file.error is caught.value
        for later in (
            lambda: ram_control_save_page(file, 0, 0, PAGE),
            lambda: ram_control_save_pages(file, 0),
            lambda: ram_control_before_iterate(file, RAM_CONTROL_ROUND),
            lambda: ram_control_after_iterate(file, RAM_CONTROL_ROUND),
            lambda: file.put(b"x"),
        ):
            with pytest.raises(PeerGone) as again:
                later()
            assert again.value is caught.value
        seen.append(caught.value)
        raise caught.value

    gone = threading.Event()
    with kit.RawListener() as listener:
        source = kit.Worker(lambda: run(listener.uri, ram, save))
        peer = listener.accept()
        kit.until("in the last phase", kit.act_as_destination(peer))
        peer.close()
        gone.set()
        with pytest.raises(PeerGone) as ended:
            source.result()
    assert seen == [ended.value]


def test_values_are_the_headers():
    names = ("SETUP", "ROUND", "HOOK", "FINISH", "BLOCK_REG")
    values = [getattr(ram_control, f"RAM_CONTROL_{name}") for name in names]
    assert values == [0, 1, 2, 3, 4]
    assert RAM_SAVE_FLAG_HOOK == 0x80
    assert (RAM_SAVE_CONTROL_NOT_SUPP, RAM_SAVE_CONTROL_DELAYED) == (-1000, -2000)


def test_hooks_on_a_file_that_has_none():
    class Kept:
        def __init__(self):
            self.data = b""

        def write(self, data):
            self.data += data

        def read(self):
            return b""

        def close(self):
            pass

    channel = Kept()
    file = QEMUFile(channel)
    sent = ctypes.c_int(7)
    assert ram_control_save_page(file, 0, 0, PAGE, sent) == RAM_SAVE_CONTROL_NOT_SUPP == -1000
    assert sent.value == 7
    assert ram_control_save_pages(file, 0) == RAM_SAVE_CONTROL_NOT_SUPP
    for flags in (RAM_CONTROL_SETUP, RAM_CONTROL_ROUND, RAM_CONTROL_FINISH):
        ram_control_before_iterate(file, flags)
        ram_control_after_iterate(file, flags)
    ram_control_load_hook(file, RAM_CONTROL_BLOCK_REG, "pc.ram")
    file.flush()
    assert channel.data == b""
    with pytest.raises(RemoteProtocolError, match="does not run over RDMA"):
        ram_control_load_hook(file, RAM_CONTROL_HOOK)
    assert file.error is not None


def test_second_migration_through_the_header_is_refused(address, kept):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        assert migrate_get_current() is end.migration.state
        with Migration() as second, pytest.raises(LocalProtocolError, match="under way") as caught:
            rdma_start_incoming_migration(
                f"rdma:{address}:0", migration=second, process=lambda *_: None
            )
        assert caught.value.exit_status == 1
        assert migrate_get_current() is end.migration.state
        end.migration.cancel()
        with pytest.raises(MigrationError):
            end.migration.wait(kit.patience(10))
    with kit.incoming(kept.parent / "free again") as third:
        assert migrate_get_current() is third.migration.state


# ---- nothing is left ----


@pytest.mark.deadline(60)
def test_thirty_migrations_leave_nothing(ram):
    """Half of them fail, at one place or another."""
    count = 30

    def save(file, _counts):
        stage = number % 6 if number % 2 else None
        if stage == 1:
            raise MigrationError("wanted")
        begin(file)
        if stage == 3:
            raise MigrationError("wanted")

        def each():
            pages(file, 0, 10)
            if stage == 5:
                raise MigrationError("wanted")

        finish(file, each)

    before = kit.resources()
    engine = Engine(count)
    opened = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            for number in range(count):
                uri = engine.told()["uri"]
                if number % 2 == 0:
                    run(uri, ram, save, pin_all=number % 4 == 0)
                    assert "digests" in engine.told()
                else:
                    with pytest.raises(MigrationError, match="wanted"):
                        run(uri, ram, save, pin_all=number % 4 == 1)
                    assert "error" in engine.told()
                if number == 0:
                    # What the libraries open once and keep is open now.
                    opened = len(os.listdir("/proc/self/fd"))
            gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= opened
        assert engine.told()["left"] <= 0
        # Both processes live, so nothing was given back by their ends.
        now = kit.resources()
        # librdmacm may keep a device open that it has used; with it, one protection domain.
        assert now["pd"] - before["pd"] <= 2
        for kind in ("cq", "qp", "mr", "cm_id"):
            assert now[kind] <= before[kind], f"{before} became {now}"
        assert kit.pinned() == 0
    finally:
        complaints = engine.close()
    assert complaints == ""
