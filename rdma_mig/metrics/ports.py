# SPDX-License-Identifier: Apache-2.0
"""What the kernel counts and knows of a device's port, from sysfs."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

__all__ = ["counters", "link_rate"]

_CLASS = Path("/sys/class/infiniband")
# In counters/, these two count words of four bytes (IB spec, PortXmitData and PortRcvData).
_WORDS = {"port_xmit_data": "port_xmit_bytes", "port_rcv_data": "port_rcv_bytes"}
_NO_COUNTERS = {"lifespan"}  # a setting that lies among them


def counters(device: str, port: int) -> dict[str, int]:
    """Return all counters of a port by name; those that cannot be read are left out.

    The kernel's names, but for what it counts in words of four bytes, which is told in bytes.
    """
    found: dict[str, int] = {}
    for folder in ("counters", "hw_counters"):
        with contextlib.suppress(OSError):
            for path in sorted((_CLASS / device / "ports" / str(port) / folder).iterdir()):
                if path.name in _NO_COUNTERS:
                    continue
                with contextlib.suppress(OSError, ValueError):
                    value = int(path.read_text(encoding="ascii"))
                    words = _WORDS.get(path.name)
                    found[words or path.name] = value * 4 if words else value
    return found


def link_rate(device: str, port: int) -> float | None:
    """Return the bytes a second that a port's link carries; None where the kernel does not say."""
    with contextlib.suppress(OSError):
        text = (_CLASS / device / "ports" / str(port) / "rate").read_text(encoding="ascii")
        if match := re.match(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) Gb/sec", text):
            return float(match[1]) * 1e9 / 8 or None
    return None
