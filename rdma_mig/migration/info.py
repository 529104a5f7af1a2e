# SPDX-License-Identifier: Apache-2.0
"""What ``info migrate`` shows: an object with the keys of QEMU's query-migrate, and its text."""

from __future__ import annotations

from typing import Any, Protocol

from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.migration import current
from rdma_mig.migration.notifiers import blocked_reasons
from rdma_mig.migration.state import migrate_get_current
from rdma_mig.migration.status import MigrationCapability, MigrationState, MigrationStatus

__all__ = ["Monitor", "do_info_migrate", "do_info_migrate_print"]


_WITHOUT_FIGURES = (MigrationStatus.SETUP, MigrationStatus.FAILED, MigrationStatus.CANCELLED)


class Monitor(Protocol):
    """What text is written to, such as ``sys.stdout``."""

    def write(self, text: str, /) -> object:
        """Take a piece of text."""
        ...


def do_info_migrate(mon: Monitor | None = None) -> dict[str, Any]:
    """Return what is known of the process's migration, as ``query-migrate`` would.

    What is not known, or has no meaning in the present state, is left out.

    Args:
        mon: not used, as in the header; `do_info_migrate_print` is what writes.
    """
    state = migrate_get_current()
    info: dict[str, Any] = {}
    reasons = blocked_reasons()
    if reasons:
        info["blocked-reasons"] = reasons
    if state.status is MigrationStatus.NONE:
        return info
    info["status"] = str(state.status)
    if state.status is MigrationStatus.FAILED and state.migration is not None:
        info["error-desc"] = state.migration.failure
    if state.status in _WITHOUT_FIGURES:
        return info
    info["total-time"] = state.elapsed_time
    info["setup-time"] = state.setup_time
    if state.status is MigrationStatus.COMPLETED:
        info["downtime"] = state.downtime
    else:
        info["expected-downtime"] = state.expected_downtime
    info["ram"] = _ram(state)
    if state.enabled(MigrationCapability.XBZRLE):
        info["xbzrle-cache"] = _xbzrle(state)
    if state.throttle_percentage:
        info["cpu-throttle-percentage"] = state.throttle_percentage
    return info


def _ram(state: MigrationState) -> dict[str, Any]:
    done = state.status is MigrationStatus.COMPLETED
    return {
        "total": state.ram_total,
        "remaining": 0 if done else current.ram_bytes_remaining(),
        "transferred": current.ram_bytes_transferred(),
        "duplicate": current.dup_mig_pages_transferred(),
        "skipped": current.skipped_mig_pages_transferred(),
        "normal": current.norm_mig_pages_transferred(),
        "normal-bytes": current.norm_mig_bytes_transferred(),
        "dirty-pages-rate": 0 if done else state.dirty_pages_rate,
        "mbps": state.mbps,
        "dirty-sync-count": state.dirty_sync_count,
        "page-size": TARGET_PAGE_SIZE,
        "pages-per-second": state.pages_per_second,
        "precopy-bytes": state.precopy_bytes,
        "downtime-bytes": state.downtime_bytes,
        # There is neither multifd nor postcopy nor zero-copy here.
        "multifd-bytes": 0,
        "postcopy-bytes": 0,
        "postcopy-requests": 0,
        "dirty-sync-missed-zero-copy": 0,
    }


def _xbzrle(state: MigrationState) -> dict[str, Any]:
    return {
        "cache-size": state.xbzrle_cache_size,
        "bytes": current.xbzrle_mig_bytes_transferred(),
        "pages": current.xbzrle_mig_pages_transferred(),
        "cache-miss": current.xbzrle_mig_pages_cache_miss(),
        "cache-miss-rate": current.xbzrle_mig_cache_miss_rate(),
        "encoding-rate": state.counters.xbzrle_encoding_rate,
        "overflow": current.xbzrle_mig_pages_overflow(),
    }


# Key, what stands before it, and in what its value is given; in the order of an `info migrate`.
_TIMES = (
    ("total-time", "total time", "{} ms"),
    ("expected-downtime", "expected downtime", "{} ms"),
    ("downtime", "downtime", "{} ms"),
    ("setup-time", "setup", "{} ms"),
)
_KBYTES = "kbytes"
_RAM = (
    ("transferred", "transferred ram", _KBYTES),
    ("mbps", "throughput", "{:.2f} mbps"),
    ("remaining", "remaining ram", _KBYTES),
    ("total", "total ram", _KBYTES),
    ("duplicate", "duplicate", "{} pages"),
    ("skipped", "skipped", "{} pages"),
    ("normal", "normal", "{} pages"),
    ("normal-bytes", "normal bytes", _KBYTES),
    ("dirty-sync-count", "dirty sync count", "{}"),
    ("page-size", "page size", _KBYTES),
    ("multifd-bytes", "multifd bytes", _KBYTES),
    ("pages-per-second", "pages-per-second", "{}"),
    ("dirty-pages-rate", "dirty pages rate", "{} pages"),
    ("precopy-bytes", "precopy ram", _KBYTES),
    ("downtime-bytes", "downtime ram", _KBYTES),
)
_XBZRLE = (
    ("cache-size", "cache size", "{} bytes"),
    ("bytes", "xbzrle transferred", _KBYTES),
    ("pages", "xbzrle pages", "{} pages"),
    ("cache-miss", "xbzrle cache miss", "{} pages"),
    ("cache-miss-rate", "xbzrle cache miss rate", "{:.2f}"),
    ("encoding-rate", "xbzrle encoding rate", "{:.2f}"),
    ("overflow", "xbzrle overflow", "{}"),
)
# Left out where they are zero.
_IF_ANY = ("dirty-pages-rate", "precopy-bytes", "downtime-bytes")


def do_info_migrate_print(mon: Monitor, data: dict[str, Any]) -> None:
    """Write what `do_info_migrate` has returned, as QEMU's ``info migrate`` shows it.

    Args:
        mon: where to.
        data: what to write; keys that are not there are left out.
    """
    lines = []
    if data.get("blocked-reasons"):
        lines.append("Outgoing migration blocked:")
        lines += [f"  {reason}" for reason in data["blocked-reasons"]]
    if "status" in data:
        error = f" ({data['error-desc']})" if data.get("error-desc") else ""
        lines.append(f"Migration status: {data['status']}{error}")
    lines += _lines(data, _TIMES)
    lines += _lines(data.get("ram", {}), _RAM)
    lines += _lines(data.get("xbzrle-cache", {}), _XBZRLE)
    if "cpu-throttle-percentage" in data:
        lines.append(f"cpu throttle percentage: {data['cpu-throttle-percentage']}")
    mon.write("".join(f"{line}\n" for line in lines))


def _lines(values: dict[str, Any], table: tuple[tuple[str, str, str], ...]) -> list[str]:
    return [
        f"{name}: "
        + (f"{values[key] >> 10} kbytes" if unit == _KBYTES else unit.format(values[key]))
        for key, name, unit in table
        if values.get(key) or (key in values and key not in _IF_ANY)
    ]
