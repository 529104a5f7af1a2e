# SPDX-License-Identifier: Apache-2.0
"""Real QEMU processes with a guest of our own, for the interop tests and the demonstration.

Needs QEMU, the GNU assembler and linker, and ``qemu.qmp``; not pytest, not a verbs device.
"""

from harness.blocks import (
    differences,
    fill_guest,
    fill_random,
    read_blocks,
    snapshot_blocks,
)
from harness.device import device_address
from harness.guest import (
    PAGE_SIZE,
    CounterError,
    Counters,
    Guest,
    check_counters,
    guest_counters,
    heartbeats_in,
)
from harness.qemu import HarnessError, Qemu, RamBlockInfo, free_port, qemu_binary

__all__ = [
    "PAGE_SIZE",
    "CounterError",
    "Counters",
    "Guest",
    "HarnessError",
    "Qemu",
    "RamBlockInfo",
    "check_counters",
    "device_address",
    "differences",
    "fill_guest",
    "fill_random",
    "free_port",
    "guest_counters",
    "heartbeats_in",
    "qemu_binary",
    "read_blocks",
    "snapshot_blocks",
]
