# SPDX-License-Identifier: Apache-2.0
"""Every name of QEMU's migration.h of 2015 has a counterpart, and a line of docs/engine.md."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import rdma_mig.migration as header

PROJECT = Path(__file__).resolve().parents[2]

# What the header declares, each in its order.
CONSTANTS = {
    "QEMU_VM_FILE_MAGIC": 0x5145564D,
    "QEMU_VM_FILE_VERSION_COMPAT": 2,
    "QEMU_VM_FILE_VERSION": 3,
    "QEMU_VM_EOF": 0,
    "QEMU_VM_SECTION_START": 1,
    "QEMU_VM_SECTION_PART": 2,
    "QEMU_VM_SECTION_END": 3,
    "QEMU_VM_SECTION_FULL": 4,
    "QEMU_VM_SUBSECTION": 5,
    "QEMU_VM_VMDESCRIPTION": 6,
    "RAM_SAVE_FLAG_HOOK": 0x80,
    "RAM_SAVE_CONTROL_NOT_SUPP": -1000,
    "RAM_SAVE_CONTROL_DELAYED": -2000,
}
STRUCTURES = {
    "MigrationParams": (
        "blk",
        "shared",
    ),
    "MigrationState": (
        "bandwidth_limit",
        "bytes_xfer",
        "xfer_limit",
        "thread",
        "cleanup_bh",
        "file",
        "state",
        "params",
        "mbps",
        "total_time",
        "downtime",
        "expected_downtime",
        "dirty_pages_rate",
        "dirty_bytes_rate",
        "enabled_capabilities",
        "xbzrle_cache_size",
        "setup_time",
        "dirty_sync_count",
    ),
}
FUNCTIONS = (
    "process_incoming_migration",
    "qemu_start_incoming_migration",
    "migrate_max_downtime",
    "do_info_migrate_print",
    "do_info_migrate",
    "exec_start_incoming_migration",
    "exec_start_outgoing_migration",
    "tcp_start_incoming_migration",
    "tcp_start_outgoing_migration",
    "unix_start_incoming_migration",
    "unix_start_outgoing_migration",
    "fd_start_incoming_migration",
    "fd_start_outgoing_migration",
    "rdma_start_outgoing_migration",
    "rdma_start_incoming_migration",
    "migrate_fd_error",
    "migrate_fd_connect",
    "migrate_fd_close",
    "add_migration_state_change_notifier",
    "remove_migration_state_change_notifier",
    "migration_in_setup",
    "migration_has_finished",
    "migration_has_failed",
    "migrate_get_current",
    "ram_bytes_remaining",
    "ram_bytes_transferred",
    "ram_bytes_total",
    "free_xbzrle_decoded_buf",
    "acct_update_position",
    "dup_mig_bytes_transferred",
    "dup_mig_pages_transferred",
    "skipped_mig_bytes_transferred",
    "skipped_mig_pages_transferred",
    "norm_mig_bytes_transferred",
    "norm_mig_pages_transferred",
    "xbzrle_mig_bytes_transferred",
    "xbzrle_mig_pages_transferred",
    "xbzrle_mig_pages_overflow",
    "xbzrle_mig_pages_cache_miss",
    "xbzrle_mig_cache_miss_rate",
    "ram_handle_compressed",
    "migrate_add_blocker",
    "migrate_del_blocker",
    "migrate_rdma_pin_all",
    "migrate_zero_blocks",
    "migrate_auto_converge",
    "xbzrle_encode_buffer",
    "xbzrle_decode_buffer",
    "migrate_use_xbzrle",
    "migrate_xbzrle_cache_size",
    "xbzrle_cache_resize",
    "ram_control_before_iterate",
    "ram_control_after_iterate",
    "ram_control_load_hook",
    "ram_control_save_page",
)
NAMES = {
    *CONSTANTS,
    *STRUCTURES,
    *(f"{structure}.{field}" for structure, fields in STRUCTURES.items() for field in fields),
    *FUNCTIONS,
}

ROW = re.compile(r"\| `([\w.]+)` \| `([\w.]+)` \| `(tests/[\w/]+\.py)::(\w+)` \|")
ROWS = ROW.findall((PROJECT / "docs" / "engine.md").read_text())


def test_table_has_every_name_once():
    assert sorted(name for name, *_ in ROWS) == sorted(NAMES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_counterpart_and_test_are_there(row):
    _name, counterpart, file, test = row
    name, _, field = counterpart.partition(".")
    found = getattr(importlib.import_module("rdma_mig.migration"), name)
    assert name in header.__all__
    if field:
        assert hasattr(found(), field)
    elif name in FUNCTIONS:
        assert callable(found)
        assert found.__doc__
    assert re.search(rf"^def {test}\(", (PROJECT / file).read_text(), re.MULTILINE), test


def test_constants_have_the_values_of_the_header():
    assert {name: getattr(header, name) for name in CONSTANTS} == CONSTANTS
