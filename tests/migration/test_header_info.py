# SPDX-License-Identifier: Apache-2.0
"""do_info_migrate beside a real QEMU's query-migrate."""

from __future__ import annotations

import io
import json
import time

import pytest
from harness import Guest as BootGuest
from harness import Qemu
from live_kit import MIB, migrate

import rdma_mig.migration as header
from rdma_mig.errors import MigrationError
from rdma_mig.migration.status import MigrationStatus


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
