# SPDX-License-Identifier: Apache-2.0
"""The functions of migration.h that speak of the process's one migration.

Each is a view of, or does something to, what `migrate_get_current` returns. Engines that run
several migrations in a process use `Migration` and its ``state`` directly.
"""

from __future__ import annotations

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import LocalProtocolError, MigrationError, UsageError
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.migration.interfaces import Guest
from rdma_mig.migration.live import LiveSource
from rdma_mig.migration.load import LiveDestination
from rdma_mig.migration.notifiers import require_unblocked
from rdma_mig.migration.state import Migration, migrate_fd_close, migrate_get_current
from rdma_mig.migration.status import MigrationCapability, MigrationState, MigrationStatus
from rdma_mig.migration.xbzrle import free_xbzrle_decoded_buf

__all__ = [
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
]


# ---- settings ----


def migrate_set_guest(guest: Guest | None) -> None:
    """Say what is migrated, or loaded into: the header leaves that to QEMU's one machine."""
    migrate_get_current().guest = guest


def migrate_set_capability(capability: MigrationCapability | str, on: bool = True) -> None:
    """Switch a capability on or off for the next migration.

    Raises:
        UsageError: there is none of that name.
        LocalProtocolError: a migration is under way.
    """
    state = migrate_get_current()
    try:
        capability = MigrationCapability(capability)
    except ValueError:
        known = ", ".join(MigrationCapability)
        raise UsageError(f"capability {capability!r} is unknown, there are {known}") from None
    if state.migration is not None and state.migration.running:
        raise LocalProtocolError("a migration is under way: capabilities stay as they are")
    state.enabled_capabilities[capability] = on


def migrate_max_downtime() -> int:
    """Return how long a guest may rest at the end, nanoseconds."""
    return migrate_get_current().max_downtime


def migrate_rdma_pin_all() -> bool:
    """Return whether all RAM is registered at the start."""
    return migrate_get_current().enabled(MigrationCapability.RDMA_PIN_ALL)


def migrate_zero_blocks() -> bool:
    """Return whether zeros in block devices are to be announced instead of sent."""
    return migrate_get_current().enabled(MigrationCapability.ZERO_BLOCKS)


def migrate_auto_converge() -> bool:
    """Return whether a guest that dirties memory too fast is slowed down."""
    return migrate_get_current().enabled(MigrationCapability.AUTO_CONVERGE)


def migrate_use_xbzrle() -> bool:
    """Return whether pages are sent as what has changed in them, where they go by the stream."""
    return migrate_get_current().enabled(MigrationCapability.XBZRLE)


def migrate_xbzrle_cache_size() -> int:
    """Return the bytes of the cache of pages that XBZRLE compares with."""
    return migrate_get_current().xbzrle_cache_size


# ---- where it stands ----


def migration_in_setup(s: MigrationState) -> bool:
    """Return whether a migration has begun and not come beyond its setup phase."""
    return s.status is MigrationStatus.SETUP


def migration_has_finished(s: MigrationState) -> bool:
    """Return whether a migration has completed."""
    return s.status is MigrationStatus.COMPLETED


def migration_has_failed(s: MigrationState) -> bool:
    """Return whether a migration has failed or was cancelled."""
    return s.status in (MigrationStatus.FAILED, MigrationStatus.CANCELLED)


def ram_bytes_remaining() -> int:
    """Return the bytes of RAM that are dirty, as far as is known."""
    return migrate_get_current().dirty_pages * TARGET_PAGE_SIZE


def ram_bytes_transferred() -> int:
    """Return the bytes that were sent for RAM, its zero pages and the words between included."""
    return migrate_get_current().counters.transferred


def ram_bytes_total() -> int:
    """Return the bytes of the guest's RAM; 0 before its first migration."""
    return migrate_get_current().ram_total


def dup_mig_pages_transferred() -> int:
    """Return how many pages were announced as zero."""
    return migrate_get_current().counters.duplicate_pages


def dup_mig_bytes_transferred() -> int:
    """Return the bytes of RAM in pages that were announced as zero."""
    return migrate_get_current().counters.duplicate_bytes


def skipped_mig_pages_transferred() -> int:
    """Return how many pages were not sent at all: none, as in a QEMU."""
    return migrate_get_current().counters.skipped_pages


def skipped_mig_bytes_transferred() -> int:
    """Return the bytes of pages that were not sent at all."""
    return migrate_get_current().counters.skipped_bytes


def norm_mig_pages_transferred() -> int:
    """Return how many pages were sent as they are."""
    return migrate_get_current().counters.normal_pages


def norm_mig_bytes_transferred() -> int:
    """Return the bytes of pages that were sent as they are."""
    return migrate_get_current().counters.normal_bytes


def xbzrle_mig_bytes_transferred() -> int:
    """Return the bytes that were sent for pages as what has changed in them."""
    return migrate_get_current().counters.xbzrle_bytes


def xbzrle_mig_pages_transferred() -> int:
    """Return how many pages were sent as what has changed in them."""
    return migrate_get_current().counters.xbzrle_pages


def xbzrle_mig_pages_overflow() -> int:
    """Return how many pages had changed so much that they were sent as they are."""
    return migrate_get_current().counters.xbzrle_overflow


def xbzrle_mig_pages_cache_miss() -> int:
    """Return how many pages were sent as they are since the cache did not have them."""
    return migrate_get_current().counters.xbzrle_cache_miss


def xbzrle_mig_cache_miss_rate() -> float:
    """Return which part of the pages of the last period the cache did not have, 0 to 1."""
    return migrate_get_current().counters.xbzrle_cache_miss_rate


# ---- running ----


def process_incoming_migration(f: QEMUFile) -> None:
    """Load a stream into the guest of the process's migration, and run it.

    It returns when that is done, in the thread that called it: the worker of an incoming
    migration, or any other where none is under way.

    Args:
        f: the file; its channel is the transport.

    Raises:
        UsageError: there is no guest.
        LocalProtocolError: another migration is under way.
        MigrationError: it failed; its ``owner`` says where the guest is.
    """
    state = migrate_get_current()
    destination = LiveDestination(state.require_guest())
    migration = state.migration
    if migration is not None and migration.is_worker:
        _load(migration, destination, f)
        return
    work = Migration.of(state)
    work.become_current()
    work.run(lambda: _load(work, destination, f), "rdma-mig-incoming")
    work.wait()


def _load(migration: Migration, destination: LiveDestination, file: QEMUFile) -> None:
    migration.connected(file)
    migration.advance(MigrationStatus.ACTIVE)
    try:
        destination.process(migration, file, file.channel)  # type: ignore[arg-type]
    finally:
        free_xbzrle_decoded_buf()


def migrate_fd_connect(s: MigrationState, *, total_seconds: float | None = None) -> None:
    """Send the guest through ``s.file``, which is connected.

    On the worker of that migration it returns when all is done. Elsewhere it starts the worker
    and returns; ``s.migration.wait()`` waits for the end.

    Args:
        s: the migration; ``s.file.channel`` is the transport.
        total_seconds: limit on it all, so that a guest that writes faster than the link carries
            does not keep it going for ever; None for none.

    Raises:
        UsageError: there is no guest, or block devices were asked for.
        LocalProtocolError: there is no file.
        MigrationError: migrations are blocked; or, on the worker, it failed.
    """
    file = s.file
    if file is None:
        raise LocalProtocolError("the migration has no file to send through")
    s.params.check()
    source = LiveSource(s.require_guest(), total_seconds=total_seconds)
    migration = s.migration
    if migration is not None and migration.is_worker:
        migration.connected(file)
        source.save(migration, file, file.channel)  # type: ignore[arg-type]
        return
    require_unblocked()
    migration = Migration.of(s)
    migration.become_current()
    work = migration

    def save() -> None:
        work.connected(file)
        source.save(work, file, file.channel)  # type: ignore[arg-type]

    work.run(save, "rdma-mig-outgoing")


def migrate_fd_error(s: MigrationState) -> None:
    """Give a migration up whose connection could not be made, or broke: it has failed.

    Its file is closed. A worker that still runs ends by itself, and nothing that it then meets is
    taken for the reason.
    """
    error = MigrationError("the connection of the migration failed", owner=s.owner)
    if s.migration is not None and s.migration.running:
        s.migration.give_up(error)
        return
    s.status = MigrationStatus.FAILED
    migrate_fd_close(s)
