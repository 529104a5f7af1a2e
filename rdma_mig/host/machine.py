# SPDX-License-Identifier: Apache-2.0
"""What the kernel and the limits on this process allow: memory, locking, dirty tracking."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from rdma_mig.errors import HostError
from rdma_mig.host.findings import Finding, Level
from rdma_mig.memory.dirty import kernel_trackers
from rdma_mig.memory.meminfo import meminfo
from rdma_mig.verbs.host import require_lockable

__all__ = ["dirty_tracking", "huge_pages", "kernel", "locked_memory", "memory"]

_CGROUP = Path("/sys/fs/cgroup")
# What pin-all or dynamic registration ends up with for a small guest, when no size was named.
_SMALL_GUEST = 1 << 30
# A cgroup of version 1 without a limit says a number near 2^63 instead of a word.
_NO_LIMIT = 1 << 60


def _mib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None where there is none, or it says "max"."""
    with contextlib.suppress(OSError, ValueError):
        value = int(path.read_text(encoding="ascii"))
        return value if value < _NO_LIMIT else None
    return None


def _cgroup_limits() -> Iterator[tuple[Path, int, int]]:
    """Each memory limit that holds for this process: its file, bytes, and bytes in use under it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _id, controllers, place = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            version2 = not controllers
            base = _CGROUP if version2 else _CGROUP / "memory"
            names = ("memory.max", "memory.current")
            if not version2:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            at = base / place.lstrip("/")
            # In a container the path may be the host's; its own root is what counts then.
            for folder in [at, *at.parents]:
                if not folder.is_relative_to(base):
                    break
                limit, used = (_number(folder / name) for name in names)
                if limit is not None:
                    yield folder / names[0], limit, used or 0


def memory(ram: int | None) -> Iterator[Finding]:
    """Whether there is memory for a guest of ``ram`` bytes; None to tell what there is."""
    info = meminfo()
    available = info.get("MemAvailable", 0)
    needs = f", {_mib(ram)} of guest RAM are needed" if ram else ""
    short = bool(ram) and ram is not None and ram > available
    yield Finding(
        "memory",
        Level.BLOCKER if short else Level.OK,
        f"{_mib(available)} of memory are available{needs}",
        "free memory, or migrate to a host with more" if short else "",
    )
    for path, limit, used in _cgroup_limits():
        left = max(limit - used, 0)
        short = bool(ram) and ram is not None and ram > left
        yield Finding(
            "cgroup-memory",
            Level.BLOCKER if short else Level.OK,
            f"{path} leaves {_mib(left)} of {_mib(limit)} to this process{needs}",
            f"raise the limit: echo max > {path} (systemd: MemoryMax=, Docker: --memory)"
            if short
            else "",
        )


def locked_memory(ram: int | None) -> Iterator[Finding]:
    """Whether this process may pin ``ram`` bytes; None to judge by a guest of 1 GiB."""
    try:
        require_lockable(ram or _SMALL_GUEST, "guest RAM")
    except HostError as error:
        level = Level.BLOCKER if ram else Level.WARNING
        yield Finding("memlock", level, error.message, error.remedy)
        return
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else _mib(soft)
    passed = ram is not None and soft != resource.RLIM_INFINITY and ram > soft
    over = (soft != resource.RLIM_INFINITY and soft < _SMALL_GUEST) or passed
    why = " and CAP_IPC_LOCK makes it void" if over else ""
    yield Finding("memlock", Level.OK, f"the limit on locked memory is {limit}{why}")


def huge_pages() -> Iterator[Finding]:
    """How many huge pages there are; a migration does without."""
    info = meminfo()
    size, total = info.get("Hugepagesize", 0), info.get("HugePages_Total", 0)
    if not total:
        yield Finding("huge-pages", Level.OK, "no huge pages are set aside; none are needed")
        return
    yield Finding(
        "huge-pages",
        Level.OK,
        f"{info.get('HugePages_Free', 0)} of {total} huge pages of {_mib(size)} are free, which "
        "incoming --huge-pages takes; memory in them cannot be used for anything else",
    )


_TRACKERS = {
    "PagemapScan": "PAGEMAP_SCAN",
    "UffdWriteProtect": "userfaultfd write-protection",
    "SoftDirty": "soft-dirty bits",
}


def dirty_tracking() -> Iterator[Finding]:
    """What this kernel tells of written pages, which a live guest of rdma-mig's own may need.

    A QEMU tracks what its guest writes by itself, and migrates without: so this never blocks.
    """
    refused = {_TRACKERS[name]: reason for name, reason in kernel_trackers().items()}
    there = [name for name, reason in refused.items() if not reason]
    lacking = "; ".join(f"{name}: {reason}" for name, reason in refused.items() if reason)
    text = f"this kernel tells which pages are written by {', '.join(there) or 'nothing'}"
    text += f" ({lacking})" if lacking else ""
    # Memory that userfaultfd's thread protects cannot be registered (docs/dirty-tracking.md).
    remedy = ""
    if refused["PAGEMAP_SCAN"] and refused["soft-dirty bits"]:
        text += "; a QEMU needs none of it, a live guest of another engine has to mark its writes"
        remedy = "for a live guest of another engine: Linux 6.7 or later, with userfaultfd allowed"
    yield Finding("dirty-tracking", Level.OK, text, remedy)


def kernel() -> Iterator[Finding]:
    """Which kernel this is."""
    yield Finding(
        "kernel",
        Level.OK,
        f"Linux {platform.release()} on {platform.machine()}, {os.cpu_count()} CPUs",
    )
