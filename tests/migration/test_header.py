# SPDX-License-Identifier: Apache-2.0
"""The functions of migration.h against the header's contract and a real QEMU's answers."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import threading
import time

import pytest
from harness import Guest as BootGuest
from harness import Qemu
from live_kit import MIB, PAGE, WritingGuest, socket_ends

import rdma_mig.migration as header
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import LocalProtocolError, MigrationError, UsageError
from rdma_mig.memory import RamBlock
from rdma_mig.migration.status import MigrationStatus
from rdma_mig.waits import Cancel

BLOCKS = (RamBlock("live.ram", 16 * MIB), RamBlock("live.more", 3 * MIB + 8192))


@pytest.fixture
def guest():
    with WritingGuest(BLOCKS) as guest:
        with guest.ram[0].memory.view() as view:
            view[MIB : 9 * MIB] = b"data" * (2 * MIB)
        yield guest


@pytest.fixture
def connection():
    """Two ends of a stream; the first is a file to save to, the second one to load from."""
    ends = socket.socketpair()
    with Cancel() as cancel:
        yield [QEMUFile(end) for end in socket_ends(ends, cancel, cancel)]
    for end in ends:
        end.close()


@pytest.fixture
def receiver(connection):
    """The other end: a process of its own would be as good, but this one can be looked into."""
    from rdma_mig.migration.load import LiveDestination
    from rdma_mig.migration.state import Migration

    with WritingGuest(BLOCKS) as guest, Migration() as migration:
        file = connection[1]
        engine = LiveDestination(guest)
        migration.run(lambda: engine.process(migration, file, file.channel), "receiver")
        yield guest


def migrate(current, guest, connection, **settings):
    """Send a guest; return the state afterwards."""
    for name, value in settings.items():
        setattr(current, name, value)
    header.migrate_set_guest(guest)
    current.file = connection[0]
    header.migrate_fd_connect(current)
    header.migrate_get_current().migration.wait(60)
    return header.migrate_get_current()


# ---- names, settings ----


def test_every_name_is_there_without_verbs():
    script = (
        "import sys; sys.modules['pyverbs'] = None; sys.modules['rdma_mig._verbs'] = None\n"
        "import rdma_mig.migration as m, rdma_mig.plugin\n"
        "assert all(getattr(m, name) is not None for name in m.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert set(header.__all__) <= set(dir(header))
    with pytest.raises(AttributeError):
        _ = header.no_such_name


def test_settings_are_those_of_a_qemu(current):
    with Qemu(memory_mib=16, paused=True, name="QEMU") as qemu:
        parameters = qemu.qmp("query-migrate-parameters")
        capabilities = {c["capability"]: c["state"] for c in qemu.qmp("query-migrate-capabilities")}
        for capability in header.MigrationCapability:
            assert capabilities[capability] is False
            qemu.set_capability(capability)
        assert qemu.query_migrate() == {}
    assert header.do_info_migrate() == {}
    assert current.bandwidth_limit == parameters["max-bandwidth"]
    assert header.migrate_max_downtime() == parameters["downtime-limit"] * 1_000_000
    assert header.migrate_xbzrle_cache_size() == parameters["xbzrle-cache-size"]


@pytest.mark.parametrize(
    ("capability", "ask"),
    [
        ("rdma-pin-all", header.migrate_rdma_pin_all),
        ("zero-blocks", header.migrate_zero_blocks),
        ("auto-converge", header.migrate_auto_converge),
        ("xbzrle", header.migrate_use_xbzrle),
    ],
)
def test_capabilities_are_switched(current, capability, ask):
    assert ask() is False
    header.migrate_set_capability(capability)
    assert ask() is True
    assert list(current.enabled_capabilities.values()).count(True) == 1
    header.migrate_set_capability(capability, False)
    assert ask() is False
    with pytest.raises(UsageError, match="unknown"):
        header.migrate_set_capability("postcopy-ram")


def test_params_of_block_devices_are_refused(current, guest, connection):
    for name in ("blk", "shared"):
        current.params = header.MigrationParams(**{name: True})
        current.file = connection[0]
        header.migrate_set_guest(guest)
        with pytest.raises(UsageError, match=rf"block devices was asked for \({name}\)"):
            header.migrate_fd_connect(current)
    assert current.status is MigrationStatus.NONE


def test_without_guest_or_file_nothing_begins(current, connection):
    with pytest.raises(LocalProtocolError, match="no file"):
        header.migrate_fd_connect(current)
    current.file = connection[0]
    with pytest.raises(UsageError, match="no guest"):
        header.migrate_fd_connect(current)
    with pytest.raises(UsageError, match="no guest"):
        header.process_incoming_migration(connection[1])


# ---- a migration ----


def test_state_through_a_migration(current, guest, connection, receiver):
    seen = []

    def note(state):
        seen.append((state.status, header.migration_in_setup(state), state.thread.is_alive()))

    header.add_migration_state_change_notifier(note)
    header.add_migration_state_change_notifier(broken := lambda _state: 1 / 0)
    began = time.monotonic()
    guest.begin()
    try:
        state = migrate(current, guest, connection, bandwidth_limit=32 * MIB)
    finally:
        header.remove_migration_state_change_notifier(note)
        header.remove_migration_state_change_notifier(broken)
    took = (time.monotonic() - began) * 1000
    assert seen == [(MigrationStatus.SETUP, True, True), (MigrationStatus.COMPLETED, False, True)]
    assert header.migration_has_finished(state)
    assert not header.migration_has_failed(state)
    assert not header.migration_in_setup(state)
    assert state is header.migrate_get_current() is current
    assert state.state == list(MigrationStatus).index(MigrationStatus.COMPLETED)
    assert state.file is None
    assert state.cleanup_bh is None
    assert not state.thread.is_alive()
    # 8 MiB at 32 MiB a second.
    assert 150 < state.total_time < took + 1
    assert state.downtime < 300
    assert state.setup_time < state.total_time
    assert state.dirty_sync_count >= 3
    assert state.xfer_limit == 0, "the last round is not limited"
    assert state.mbps == pytest.approx(
        header.ram_bytes_transferred() * 8 / state.total_time / 1000, rel=0.01
    )
    with pytest.raises(ValueError, match="not in list"):
        header.remove_migration_state_change_notifier(note)


def test_windows_and_meanings_while_it_runs(current, guest, connection, receiver):
    header.migrate_set_guest(guest)
    guest.begin()
    current.bandwidth_limit = 4 * MIB
    current.file = connection[0]
    header.migrate_fd_connect(current)
    began = current.total_time
    while not current.xfer_limit:
        assert time.monotonic() < began / 1000 + 10
        time.sleep(0.001)
    assert abs(began - time.monotonic() * 1000) < 5000, "it holds when the migration began"
    samples = []
    sent = current.precopy_bytes
    end = time.monotonic() + 1.3
    while time.monotonic() < end:
        samples.append((current.bytes_xfer, current.xfer_limit))
        time.sleep(0.01)
    limit = 4 * MIB // 10
    assert {allowed for _, allowed in samples} == {limit}
    # A window may overrun by what is taken at once, 64 pages.
    assert 0 < max(used for used, _ in samples) <= limit + 64 * (PAGE + 64) + 64
    assert len({used for used, _ in samples}) > 3
    assert current.mbps > 0
    assert (current.precopy_bytes - sent) / 1.3 == pytest.approx(4 * MIB, rel=0.25)
    info = header.do_info_migrate()
    assert info["status"] == "active"
    assert info["expected-downtime"] >= 0
    assert 1000 < info["total-time"] < 10_000
    assert current.dirty_bytes_rate == current.dirty_pages_rate * PAGE
    assert current.status is MigrationStatus.ACTIVE
    remaining = header.ram_bytes_remaining()
    assert 0 < remaining < header.ram_bytes_total() == 19 * MIB + 8192
    with pytest.raises(LocalProtocolError, match="under way"):
        header.migrate_set_capability("xbzrle")
    with pytest.raises(LocalProtocolError, match="under way"):
        header.migrate_fd_connect(current)
    current.bandwidth_limit = 0
    assert current.migration.wait(30)
    assert current.total_time < 10_000, "it holds how long it took"
    assert header.ram_bytes_remaining() == 0 or current.dirty_pages >= 0


def test_counters_add_up(current, guest, connection, receiver):
    state = migrate(current, guest, connection)
    pages = (19 * MIB + 8192) // PAGE
    assert header.norm_mig_pages_transferred() == 2048
    assert header.dup_mig_pages_transferred() == pages - 2048
    assert header.norm_mig_bytes_transferred() == 8 * MIB
    assert header.dup_mig_bytes_transferred() == 11 * MIB + 8192
    assert header.skipped_mig_pages_transferred() == header.skipped_mig_bytes_transferred() == 0
    assert header.ram_bytes_total() == 19 * MIB + 8192
    # 8 bytes a normal page, 9 a zero one, a few names, and 8 a round.
    sent = header.ram_bytes_transferred() - 8 * MIB - 8 * 2048 - 9 * (pages - 2048)
    assert 8 * state.rounds <= sent < 8 * state.rounds + 4096
    assert guest.digests() == receiver.digests()


def test_acct_update_position(connection):
    file = connection[0]
    header.acct_update_position(file, 3 * PAGE, False)
    header.acct_update_position(file, 5 * PAGE, True)
    assert (file.counters.normal_pages, file.counters.duplicate_pages) == (3, 5)
    assert file.position == file.counters.transferred == 3 * PAGE


def test_blocker_says_why(current, guest, connection):
    reason = MigrationError("the guest has a passed-through device")
    header.migrate_add_blocker(reason)
    try:
        assert header.do_info_migrate() == {"blocked-reasons": [str(reason)]}
        with pytest.raises(MigrationError, match="passed-through device"):
            migrate(current, guest, connection)
        with pytest.raises(MigrationError, match="passed-through device"):
            header.rdma_start_outgoing_migration(current, "rdma:127.0.0.1:1")
        assert current.status is MigrationStatus.NONE
    finally:
        header.migrate_del_blocker(reason)
    assert header.do_info_migrate() == {}
    with pytest.raises(ValueError, match="no such blocker"):
        header.migrate_del_blocker(reason)


def test_process_incoming_migration(current, guest, connection, tmp_path):
    from rdma_mig.migration.live import LiveSource
    from rdma_mig.migration.state import Migration

    with WritingGuest(BLOCKS) as source, Migration() as sender:
        with source.ram[0].memory.view() as view:
            view[: 4 * PAGE] = b"from" * PAGE
        file = connection[0]
        engine = LiveSource(source)
        sender.run(lambda: engine.save(sender, file, file.channel), "sender")
        header.migrate_set_guest(guest)
        header.process_incoming_migration(connection[1])
        sender.wait(30)
        assert source.digests() == guest.digests()
    assert guest.calls == ["resume"]
    assert header.migration_has_finished(header.migrate_get_current())


def test_broken_stream_fails_and_the_next_migration_keeps_the_settings(current, guest, connection):
    current.bandwidth_limit = 3 * MIB
    header.migrate_set_capability("xbzrle")
    connection[1].close()
    with pytest.raises(MigrationError, match="the guest is still here"):
        migrate(current, guest, connection)
    state = header.migrate_get_current()
    assert header.migration_has_failed(state)
    info = header.do_info_migrate()
    assert info["status"] == "failed"
    assert "takes no more" in info["error-desc"]
    state.file = connection[0]
    header.migrate_fd_connect(state)
    after = header.migrate_get_current()
    assert after is not state
    assert (after.bandwidth_limit, after.guest) == (3 * MIB, guest)
    assert header.migrate_use_xbzrle()
    with pytest.raises(MigrationError):
        after.migration.wait(30)


def test_fd_error_and_close(current, guest, connection, receiver):
    assert header.migrate_fd_close(current) == 0
    current.file = connection[0]
    connection[0].fail(MigrationError("gone"))
    assert header.migrate_fd_close(current) < 0
    assert current.file is None
    header.migrate_fd_error(current)
    assert header.migration_has_failed(current)


def test_fd_error_ends_a_migration_under_way_as_failed(current, guest, connection, receiver):
    current.bandwidth_limit = MIB
    header.migrate_set_guest(guest)
    current.file = connection[0]
    header.migrate_fd_connect(current)
    end = time.monotonic() + 10
    while current.rounds < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    header.migrate_fd_error(current)
    with pytest.raises(MigrationError, match="connection of the migration failed"):
        current.migration.wait(10)
    assert current.status is MigrationStatus.FAILED
    assert current.file is None
    assert "stop" not in guest.calls


# ---- XBZRLE, zero pages ----


class Generations:
    """A guest's tracker that dirties its pages itself, a few times, and then never again.

    Args:
        dirty: does it; called with the number of the generation, from 1, and returns how many
            pages from the first on it has written.
    """

    atomic = True

    def __init__(self, count, dirty):
        self.left = count
        self.dirty = dirty
        self.number = 0

    def start(self):
        pass

    def stop(self):
        pass

    def harvest(self, index, into):
        if index or self.number == self.left:
            return 0
        self.number += 1
        pages = self.dirty(self.number)
        into.set(0, pages)
        return pages


def test_xbzrle_counts_and_its_cache_is_resized_while_it_runs(current, guest, connection, receiver):
    seen = {}

    def dirty(number):
        if number == 10:
            seen.update(header.do_info_migrate())
            seen["resized"] = header.xbzrle_cache_resize(2 * MIB)
        with guest.ram[0].memory.view() as view:
            for page in range(64):
                view[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "big")
        return 64

    guest.tracker = Generations(20, dirty)
    header.migrate_set_capability("xbzrle")
    assert header.xbzrle_cache_resize(5 * MIB) == 4 * MIB == header.migrate_xbzrle_cache_size()
    with pytest.raises(ValueError, match="a page has 4096"):
        header.xbzrle_cache_resize(100)
    assert header.migrate_xbzrle_cache_size() == 4 * MIB
    migrate(current, guest, connection, max_downtime=0)
    assert seen["xbzrle-cache"]["cache-size"] == 4 * MIB
    assert seen["resized"] == header.migrate_xbzrle_cache_size() == 2 * MIB
    # The first generation is found in setup, and the second one is what fills the cache.
    assert header.xbzrle_mig_pages_cache_miss() == 64
    pages, size = header.xbzrle_mig_pages_transferred(), header.xbzrle_mig_bytes_transferred()
    assert pages == 18 * 64
    assert pages * 12 < size < pages * 40
    assert header.xbzrle_mig_pages_overflow() == 0
    assert guest.digests() == receiver.digests()


def test_cache_miss_rate_of_a_period(current, guest, connection, receiver):
    def dirty(number):
        time.sleep(0.02 if number < 60 else 0)
        with guest.ram[0].memory.view() as view:
            # More pages than the cache holds: each one is missed.
            for page in range(64):
                view[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "big")
        return 64

    guest.tracker = Generations(70, dirty)
    header.migrate_set_capability("xbzrle")
    header.xbzrle_cache_resize(PAGE)
    migrate(current, guest, connection, max_downtime=0)
    assert 0.9 < header.xbzrle_mig_cache_miss_rate() <= 1
    assert header.xbzrle_mig_pages_cache_miss() > 1000


def test_cache_gives_pages_up_that_were_not_sent_for_two_rounds(
    current, guest, connection, receiver
):
    """So that it follows a guest that turns to other memory; each fetch of marks is a round."""

    class Turning(Generations):
        def harvest(self, index, into):
            if index or self.number == self.left:
                return 0
            self.number += 1
            first = 0 if self.number < 6 else 64
            with guest.ram[0].memory.view() as view:
                for page in range(first, first + 64):
                    view[page * PAGE : page * PAGE + 8] = self.number.to_bytes(8, "big")
            into.set(first, 64)
            return 64

    guest.tracker = Turning(20, None)
    header.migrate_set_capability("xbzrle")
    header.xbzrle_cache_resize(64 * PAGE)
    migrate(current, guest, connection, max_downtime=0)
    # Generation 1 is found in setup, 2 fills the cache; 6 does not get in yet, 7 does.
    assert header.xbzrle_mig_pages_cache_miss() == 3 * 64
    assert header.xbzrle_mig_pages_transferred() == (3 + 13) * 64
    assert guest.digests() == receiver.digests()


def test_xbzrle_overflow_is_counted(current, guest, connection, receiver):
    fill = bytes(range(1, 256)) * 40

    def dirty(number):
        with guest.ram[0].memory.view() as view:
            view[: 2 * PAGE] = fill[number : number + 2 * PAGE]
        return 2

    guest.tracker = Generations(5, dirty)
    header.migrate_set_capability("xbzrle")
    migrate(current, guest, connection, max_downtime=0)
    assert header.xbzrle_mig_pages_overflow() == 2 * 3
    assert header.xbzrle_mig_pages_transferred() == 0
    assert guest.digests() == receiver.digests()


def test_xbzrle_buffers(current):
    old, new = bytes(PAGE), bytearray(PAGE)
    new[100:108] = b"changed!"
    dst = bytearray(PAGE)
    size = header.xbzrle_encode_buffer(old, new, PAGE, dst, PAGE)
    assert bytes(dst[:size]) == b"\x64\x08changed!"
    assert header.xbzrle_encode_buffer(new, new, PAGE, dst, PAGE) == 0
    assert header.xbzrle_encode_buffer(old, new, PAGE, bytearray(PAGE), 9) == -1
    size = header.xbzrle_encode_buffer(old, new, PAGE, dst, PAGE)
    page = bytearray(PAGE)
    assert header.xbzrle_decode_buffer(dst, size, page, PAGE) == 108
    assert page == new
    assert header.xbzrle_decode_buffer(dst, size, bytearray(PAGE), 107) == -1
    assert header.xbzrle_decode_buffer(dst, 1, page, PAGE) == -1
    header.ram_handle_compressed(page, 7, 50)
    assert page[:51] == b"\7" * 50 + b"\0"
    with pytest.raises(ValueError, match="of a buffer of"):
        header.ram_handle_compressed(page, 0, PAGE + 1)


def test_page_that_xbzrle_is_decoded_in_is_freed_at_the_end(current, guest, connection):
    """It is there from the first XBZRLE page on, and nobody frees it under who loads."""
    from rdma_mig.migration.live import LiveSource
    from rdma_mig.migration.state import Migration

    reached, go_on = threading.Event(), threading.Event()
    with WritingGuest(BLOCKS) as source, Migration() as sender:

        def dirty(number):
            if number == 10:
                reached.set()
                go_on.wait(20)
            with source.ram[0].memory.view() as view:
                for page in range(64):
                    view[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "big")
            return 64

        source.tracker = Generations(12, dirty)
        sender.state.max_downtime = 0
        sender.state.enabled_capabilities[header.MigrationCapability.XBZRLE] = True
        file, engine = connection[0], LiveSource(source)
        sender.run(lambda: engine.save(sender, file, file.channel), "sender")
        header.migrate_set_guest(guest)
        header.free_xbzrle_decoded_buf()
        loader = threading.Thread(target=header.process_incoming_migration, args=connection[1:])
        loader.start()
        try:
            assert reached.wait(20)
            wait_until(lambda: current.page_reader.decoded_size == PAGE)
            with pytest.raises(LocalProtocolError, match="still being loaded"):
                header.free_xbzrle_decoded_buf()
        finally:
            go_on.set()
            loader.join()
        sender.wait(20)
        assert source.digests() == guest.digests()
    reader = current.page_reader
    assert reader.counters.xbzrle_pages > 0
    assert reader.decoded_size == 0
    reader.load(xbzrle_record())
    assert reader.decoded_size == PAGE
    header.free_xbzrle_decoded_buf()
    assert reader.decoded_size == 0


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def xbzrle_record():
    """Page 0 of the first block: its first byte changes."""
    name = BLOCKS[0].idstr.encode()
    return (0x40).to_bytes(8, "big") + bytes([len(name)]) + name + b"\1\0\3\0\1x"


# ---- info migrate ----


def keys(info):
    """All keys of an answer, those of its parts with the part's."""
    found = set()
    for key, value in info.items():
        found |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    return found


def words(text):
    """What stands before the colon in each line of figures."""
    return [line.partition(":")[0] for line in text.splitlines() if ":" in line]


@pytest.fixture(scope="module")
def answers():
    """What a real QEMU says of a migration while it runs, when it is done, cancelled, failed."""
    told = {}
    with Qemu(guest=BootGuest.dirtying(8), memory_mib=64, name="QEMU") as qemu:
        qemu.set_capability("auto-converge")
        qemu.set_parameter("max-bandwidth", 2 * MIB)
        qemu.set_parameter("downtime-limit", 1)
        qemu.wait_heartbeat()
        qemu.migrate("exec:cat > /dev/null")
        qemu.wait("a throttle", lambda: "cpu-throttle-percentage" in qemu.query_migrate())
        told["active"] = qemu.query_migrate()
        told["active text"] = qemu.hmp("info migrate")
        qemu.qmp("migrate_cancel")
        qemu.wait("its end", lambda: qemu.query_migrate()["status"] == "cancelled")
        told["cancelled"] = qemu.query_migrate()
        qemu.set_capability("xbzrle")
        qemu.set_parameter("max-bandwidth", 1 << 30)
        qemu.set_parameter("downtime-limit", 2000)
        qemu.migrate("exec:cat > /dev/null")
        qemu.wait("its end", lambda: qemu.query_migrate()["status"] == "completed")
        told["completed"] = qemu.query_migrate()
        told["completed text"] = qemu.hmp("info migrate")
    with Qemu(memory_mib=16, name="QEMU") as qemu:
        qemu.migrate("exec:exit 1")
        qemu.wait("its end", lambda: qemu.query_migrate()["status"] == "failed")
        told["failed"] = qemu.query_migrate()
    return told


def test_answers_have_the_keys_of_a_qemu(current, guest, connection, receiver, answers):
    header.migrate_set_guest(guest)
    header.migrate_set_capability("auto-converge")
    guest.begin()
    current.bandwidth_limit = 2 * MIB
    current.file = connection[0]
    header.migrate_fd_connect(current)
    end = time.monotonic() + 10
    while current.status is not MigrationStatus.ACTIVE:
        assert time.monotonic() < end
        time.sleep(0.005)
    current.throttle_percentage = 20
    info = header.do_info_migrate()
    assert keys(info) == keys(answers["active"])
    text = io.StringIO()
    header.do_info_migrate_print(text, info)
    assert set(words(text.getvalue())) >= {"Migration status", "expected downtime", "total ram"}
    current.throttle_percentage = 0
    current.enabled_capabilities[header.MigrationCapability.XBZRLE] = True
    current.bandwidth_limit = 0
    assert current.migration.wait(30)
    done = header.do_info_migrate()
    assert keys(done) == keys(answers["completed"])
    json.dumps(done)
    for kind in ("total", "remaining", "duplicate", "skipped", "multifd-bytes", "page-size"):
        assert type(done["ram"][kind]) is type(answers["completed"]["ram"][kind])
    assert done["ram"]["remaining"] == answers["completed"]["ram"]["remaining"] == 0
    assert done["ram"]["page-size"] == answers["completed"]["ram"]["page-size"]
    text = io.StringIO()
    header.do_info_migrate_print(text, done)
    theirs = answers["completed text"].partition("Migration status")[2]
    optional = {"dirty pages rate", "precopy ram", "downtime ram"}
    assert [w for w in words(text.getvalue())[1:] if w not in optional] == [
        w for w in words("Migration status" + theirs)[1:] if w not in optional
    ]


def test_failed_and_cancelled_answer_as_a_qemu_does(current, guest, connection, receiver, answers):
    header.migrate_set_guest(guest)
    current.bandwidth_limit = MIB
    current.file = connection[0]
    header.migrate_fd_connect(current)
    current.migration.cancel()
    with pytest.raises(MigrationError):
        current.migration.wait(10)
    assert header.do_info_migrate() == answers["cancelled"] == {"status": "cancelled"}
    connection[0].fail(MigrationError("gone"))
    with pytest.raises(MigrationError):
        migrate(current, guest, connection)
    assert keys(header.do_info_migrate()) == keys(answers["failed"])
