# SPDX-License-Identifier: Apache-2.0
"""The migration engine: state, RAM hooks, and what it sends and receives.

Every name of QEMU's ``migration.h`` can be imported from here (docs/engine.md lists them). They
are looked up when they are first used: what needs verbs libraries is loaded by then only.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "rdma_mig.migration.status": (
        "MigrationCapability",
        "MigrationParams",
        "MigrationState",
        "MigrationStatus",
    ),
    "rdma_mig.migration.state": ("Migration", "migrate_fd_close", "migrate_get_current"),
    "rdma_mig.migration.uris": ("qemu_start_incoming_migration", "qemu_start_outgoing_migration"),
    "rdma_mig.migration.channels": (
        "exec_start_incoming_migration",
        "exec_start_outgoing_migration",
        "fd_start_incoming_migration",
        "fd_start_outgoing_migration",
        "file_start_incoming_migration",
        "file_start_outgoing_migration",
        "tcp_start_incoming_migration",
        "tcp_start_outgoing_migration",
        "unix_start_incoming_migration",
        "unix_start_outgoing_migration",
    ),
    "rdma_mig.migration.notifiers": (
        "add_migration_state_change_notifier",
        "migrate_add_blocker",
        "migrate_del_blocker",
        "remove_migration_state_change_notifier",
    ),
    "rdma_mig.migration.current": (
        "dup_mig_bytes_transferred",
        "dup_mig_pages_transferred",
        "migrate_auto_converge",
        "migrate_fd_connect",
        "migrate_fd_error",
        "migrate_max_downtime",
        "migrate_rdma_pin_all",
        "migrate_set_capability",
        "migrate_set_guest",
        "migrate_use_xbzrle",
        "migrate_xbzrle_cache_size",
        "migrate_zero_blocks",
        "migration_has_failed",
        "migration_has_finished",
        "migration_in_setup",
        "norm_mig_bytes_transferred",
        "norm_mig_pages_transferred",
        "process_incoming_migration",
        "ram_bytes_remaining",
        "ram_bytes_total",
        "ram_bytes_transferred",
        "skipped_mig_bytes_transferred",
        "skipped_mig_pages_transferred",
        "xbzrle_mig_bytes_transferred",
        "xbzrle_mig_cache_miss_rate",
        "xbzrle_mig_pages_cache_miss",
        "xbzrle_mig_pages_overflow",
        "xbzrle_mig_pages_transferred",
    ),
    "rdma_mig.migration.xbzrle": (
        "free_xbzrle_decoded_buf",
        "ram_handle_compressed",
        "xbzrle_cache_resize",
        "xbzrle_decode_buffer",
        "xbzrle_encode_buffer",
    ),
    "rdma_mig.migration.info": ("do_info_migrate", "do_info_migrate_print"),
    "rdma_mig.migration.ram_control": (
        "RAM_CONTROL_BLOCK_REG",
        "RAM_CONTROL_FINISH",
        "RAM_CONTROL_HOOK",
        "RAM_CONTROL_ROUND",
        "RAM_CONTROL_SETUP",
        "RAM_SAVE_CONTROL_DELAYED",
        "RAM_SAVE_CONTROL_NOT_SUPP",
        "acct_update_position",
        "ram_control_after_iterate",
        "ram_control_before_iterate",
        "ram_control_load_hook",
        "ram_control_save_page",
        "ram_control_save_pages",
    ),
    "rdma_mig.migration.rdma": ("rdma_start_incoming_migration", "rdma_start_outgoing_migration"),
    "rdma_mig.migration.live": ("LiveSource",),
    "rdma_mig.migration.load": ("LiveDestination",),
    "rdma_mig.migration.guests": ("ProcessGuest", "SnapshotGuest"),
    "rdma_mig.wire.stream": (
        "QEMU_VM_EOF",
        "QEMU_VM_FILE_MAGIC",
        "QEMU_VM_FILE_VERSION",
        "QEMU_VM_FILE_VERSION_COMPAT",
        "QEMU_VM_SECTION_END",
        "QEMU_VM_SECTION_FULL",
        "QEMU_VM_SECTION_PART",
        "QEMU_VM_SECTION_START",
        "QEMU_VM_SUBSECTION",
        "QEMU_VM_VMDESCRIPTION",
        "RAM_SAVE_FLAG_HOOK",
    ),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 - a list of what is looked up


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
