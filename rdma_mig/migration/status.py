# SPDX-License-Identifier: Apache-2.0
"""What is known of a migration: migration.h's ``struct MigrationState``, and the types in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from rdma_mig.channel.counters import RamCounters
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import UsageError

if TYPE_CHECKING:
    from rdma_mig.memory.page_stream import PageReader, XbzrleCache
    from rdma_mig.migration.interfaces import Guest
    from rdma_mig.migration.state import Migration

__all__ = [
    "DEFAULT_BANDWIDTH_LIMIT",
    "DEFAULT_MAX_DOWNTIME",
    "DEFAULT_XBZRLE_CACHE_SIZE",
    "MigrationCapability",
    "MigrationParams",
    "MigrationState",
    "MigrationStatus",
    "clock_ms",
]

DEFAULT_BANDWIDTH_LIMIT = 128 << 20
"""Bytes a second: the default of QEMU 7.2."""

DEFAULT_MAX_DOWNTIME = 300_000_000
"""Nanoseconds that a guest may rest at the end."""

DEFAULT_XBZRLE_CACHE_SIZE = 64 << 20
"""Bytes of the cache of pages that XBZRLE compares with."""


def clock_ms() -> int:
    """Return the time in milliseconds on CLOCK_MONOTONIC."""
    return time.monotonic_ns() // 1_000_000


class MigrationStatus(StrEnum):
    """States of a migration, named as QEMU's ``query-migrate`` names them."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether it does not change by itself any more, and a migration has been."""
        return self in (self.COMPLETED, self.FAILED, self.CANCELLED)


# The header has an int; the numbers are this package's own.
_NUMBERS = {status: number for number, status in enumerate(MigrationStatus)}


class MigrationCapability(StrEnum):
    """What can be switched on for a migration, under QEMU's names.

    ``zero-blocks`` is about the content of block devices: it can be switched on, as in a QEMU that
    has none, and there is nothing that it could apply to.
    """

    XBZRLE = "xbzrle"
    RDMA_PIN_ALL = "rdma-pin-all"
    AUTO_CONVERGE = "auto-converge"
    ZERO_BLOCKS = "zero-blocks"


@dataclass(frozen=True, slots=True)
class MigrationParams:
    """Whether block devices shall be copied, too.

    Attributes:
        blk: copy them whole.
        shared: copy what lies above a base image that both ends see.
    """

    blk: bool = False
    shared: bool = False

    def check(self) -> None:
        """Refuse what a machine without block devices cannot do.

        Raises:
            UsageError: ``blk`` or ``shared`` is set.
        """
        for name, value in (("blk", self.blk), ("shared", self.shared)):
            if value:
                raise UsageError(
                    f"the migration of block devices was asked for ({name}), and there are none",
                    remedy="copy disks by other means, and leave it off",
                )


def _no_capabilities() -> dict[MigrationCapability, bool]:
    return dict.fromkeys(MigrationCapability, False)


@dataclass(slots=True, eq=False)
class MigrationState:
    """What migration.h says of a migration, and what is set for it.

    The settings (limits, capabilities, cache size, guest) stay from one migration to the next; the
    rest begins anew. Times are milliseconds, as in the header, but for ``max_downtime``.

    Attributes:
        bandwidth_limit: bytes a second; 0 for no limit. May be changed while it runs.
        bytes_xfer: bytes charged in the present window of 100 ms.
        xfer_limit: bytes that may be charged in a window; 0 for no limit.
        thread: the worker.
        cleanup_bh: what is called on the worker when the migration has ended.
        file: the stream, while there is one.
        params: of block devices.
        mbps: megabits a second in the last window; at the end, over the whole; -1 if that took
            no time.
        total_time: while it runs, when it began; at the end, how long it took.
        downtime: from just before the guest was stopped to completion.
        expected_downtime: how long the guest would rest if it were stopped now.
        dirty_pages_rate: pages of 4096 bytes that the guest dirties in a second.
        dirty_bytes_rate: the same in bytes.
        enabled_capabilities: which are on.
        xbzrle_cache_size: bytes.
        setup_time: up to the end of the setup phase; pinning memory is part of it.
        dirty_sync_count: how often the dirty pages were fetched from the tracker.
        status: where it stands; ``state`` is its number.
        max_downtime: nanoseconds that the guest may rest at the end.
        throttle_percentage: how much of its time auto-converge takes from the guest.
        dirty_pages: pages that are still to be sent.
        pages_per_second: pages sent, data or zero, in the last window.
        precopy_bytes, downtime_bytes: sent for RAM while the guest ran, and while it rested.
        ram_total: bytes of the guest's RAM.
        rounds: RAM phases after setup, the last one included.
        bytes_transferred: RAM bytes that were moved.
        xbzrle_cache: pages that XBZRLE compares with, while a source uses it.
        page_reader: takes pages out of the stream, at a destination that gets them there.
        owner: who owns the virtual machine should the migration fail now; one clause.
        step: what the migration is at, for messages; a participle: "receiving device state".
        counters: what became of the guest's pages.
        guest: what is migrated, or loaded into; the header leaves it to QEMU's one machine.
        migration: runs this migration; None before the first.
    """

    bandwidth_limit: int = DEFAULT_BANDWIDTH_LIMIT
    bytes_xfer: int = 0
    xfer_limit: int = 0
    thread: threading.Thread | None = None
    cleanup_bh: Callable[[], None] | None = None
    file: QEMUFile | None = None
    params: MigrationParams = field(default_factory=MigrationParams)
    mbps: float = 0.0
    total_time: int = 0
    downtime: int = 0
    expected_downtime: int = 0
    dirty_pages_rate: int = 0
    dirty_bytes_rate: int = 0
    enabled_capabilities: dict[MigrationCapability, bool] = field(default_factory=_no_capabilities)
    xbzrle_cache_size: int = DEFAULT_XBZRLE_CACHE_SIZE
    setup_time: int = 0
    dirty_sync_count: int = 0
    status: MigrationStatus = MigrationStatus.NONE
    max_downtime: int = DEFAULT_MAX_DOWNTIME
    throttle_percentage: int = 0
    dirty_pages: int = 0
    pages_per_second: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    ram_total: int = 0
    rounds: int = 0
    bytes_transferred: int = 0
    xbzrle_cache: XbzrleCache | None = field(default=None, repr=False)
    page_reader: PageReader | None = field(default=None, repr=False)
    owner: str = ""
    step: str = ""
    counters: RamCounters = field(default_factory=RamCounters)
    guest: Guest | None = None
    migration: Migration | None = field(default=None, repr=False)

    @property
    def state(self) -> int:
        """The number of ``status``."""
        return _NUMBERS[self.status]

    @property
    def elapsed_time(self) -> int:
        """Milliseconds that it took, or has taken so far: either meaning of ``total_time``."""
        if self.status is MigrationStatus.NONE:
            return 0
        return self.total_time if self.status.final else clock_ms() - self.total_time

    @property
    def setup_seconds(self) -> float:
        """``setup_time`` in seconds."""
        return self.setup_time / 1000

    @setup_seconds.setter
    def setup_seconds(self, seconds: float) -> None:
        self.setup_time = round(seconds * 1000)

    def enabled(self, capability: MigrationCapability) -> bool:
        """Whether a capability is on."""
        return self.enabled_capabilities[capability]

    def require_guest(self) -> Guest:
        """Return the guest.

        Raises:
            UsageError: none was set.
        """
        if self.guest is None:
            raise UsageError("there is no guest: say what is migrated (migrate_set_guest)")
        return self.guest

    def successor(self) -> MigrationState:
        """Return a state for the next migration: the same settings, and nothing done yet."""
        return MigrationState(
            bandwidth_limit=self.bandwidth_limit,
            params=self.params,
            enabled_capabilities=dict(self.enabled_capabilities),
            xbzrle_cache_size=self.xbzrle_cache_size,
            max_downtime=self.max_downtime,
            guest=self.guest,
        )
