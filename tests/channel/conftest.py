# SPDX-License-Identifier: Apache-2.0
"""Migrations without RDMA, with a real QEMU, on this machine: no device and no lab."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

from channel_kit import GUEST, Stored, leave
from harness import Qemu

from rdma_mig.migration import state
from rdma_mig.migration.status import MigrationState


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """A running guest of a real QEMU as a snapshot, and as the stream that it came in."""
    directory = tmp_path_factory.mktemp("stored")
    with Qemu(guest=GUEST, name="source") as source:
        source.wait_heartbeat(2)
        yield leave(source, directory)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[MigrationState]:
    """The process's one migration, with nothing set; what is started on it is closed."""
    fresh = MigrationState()
    monkeypatch.setattr(state, "_current", fresh)
    yield fresh
    last = state.migrate_get_current().migration
    if last is not None:
        last.close()
