# SPDX-License-Identifier: Apache-2.0
"""A virtual machine on disk: a directory that is written whole or not at all, and checked."""

from __future__ import annotations

from rdma_mig.snapshot._fs import human
from rdma_mig.snapshot.manifest import BlockRecord, FileRecord, Manifest, SharedBlock, StreamFacts
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
