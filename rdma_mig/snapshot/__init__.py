# SPDX-License-Identifier: Apache-2.0
"""A virtual machine on disk: a directory that is written whole or not at all, and checked.

Names are looked up when they are first used: who reads a snapshot needs nothing that writes one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdma_mig.snapshot._fs import human
    from rdma_mig.snapshot.manifest import (
        BlockRecord,
        FileRecord,
        Manifest,
        SharedBlock,
        StreamFacts,
    )
    from rdma_mig.snapshot.reader import Snapshot
    from rdma_mig.snapshot.recorded import RecordedCommand, require_trustworthy
    from rdma_mig.snapshot.writer import DEVICE_STATE_RESERVE, SnapshotWriter

__all__ = [
    "DEVICE_STATE_RESERVE",
    "BlockRecord",
    "FileRecord",
    "Manifest",
    "RecordedCommand",
    "SharedBlock",
    "Snapshot",
    "SnapshotWriter",
    "StreamFacts",
    "human",
    "require_trustworthy",
]

_MODULE_OF = {
    "DEVICE_STATE_RESERVE": "writer",
    "BlockRecord": "manifest",
    "FileRecord": "manifest",
    "Manifest": "manifest",
    "RecordedCommand": "recorded",
    "SharedBlock": "manifest",
    "Snapshot": "reader",
    "SnapshotWriter": "writer",
    "StreamFacts": "manifest",
    "human": "_fs",
    "require_trustworthy": "recorded",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
