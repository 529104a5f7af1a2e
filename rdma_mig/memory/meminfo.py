# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of this host's memory (proc(5), /proc/meminfo)."""

from __future__ import annotations

from pathlib import Path

from rdma_mig.errors import HostError

__all__ = ["available_memory", "free_huge_pages", "huge_page_size", "meminfo"]


def meminfo() -> dict[str, int]:
    """/proc/meminfo, in bytes where it says kB, else as it says; empty where there is none."""
    values: dict[str, int] = {}
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return values
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        values[key] = int(number) * (1024 if unit == "kB" else 1)
    return values


def available_memory() -> int:
    """Return the bytes that this host can still give to processes (MemAvailable).

    Raises:
        HostError: the kernel does not say.
    """
    available = meminfo().get("MemAvailable")
    if available is None:
        raise HostError("/proc/meminfo does not say how much memory is available")
    return available


def huge_page_size() -> int:
    """Bytes of the huge pages that this kernel hands out by default; 0 when it has none."""
    return meminfo().get("Hugepagesize", 0)


def free_huge_pages() -> int:
    """Huge pages that are neither used nor promised to anybody."""
    info = meminfo()
    return info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0)
