# SPDX-License-Identifier: Apache-2.0
"""Guest memory: RAM blocks, their bytes, which of their pages are dirty, chunk arithmetic."""

from __future__ import annotations

from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import (
    CHUNK_SIZE,
    TARGET_PAGE_SIZE,
    RamBlock,
    chunk_count,
    chunk_of,
    chunk_range,
)
from rdma_mig.memory.guest import GuestMemory, MemoryHold

__all__ = [
    "CHUNK_SIZE",
    "TARGET_PAGE_SIZE",
    "DirtyBitmap",
    "GuestMemory",
    "MemoryHold",
    "RamBlock",
    "chunk_count",
    "chunk_of",
    "chunk_range",
]
