# SPDX-License-Identifier: Apache-2.0
"""The functions of migration.h against the header's contract."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from harness import Qemu
from live_kit import BLOCKS, MIB, PAGE, WritingGuest, migrate

import rdma_mig.migration as header
from rdma_mig.errors import LocalProtocolError, MigrationError, UsageError
from rdma_mig.migration.status import MigrationStatus

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
