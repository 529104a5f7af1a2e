# SPDX-License-Identifier: Apache-2.0
"""Makes the kits of the tests importable, and gives a test a migration of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parents[1]
for room in ("", "migration", "rdma", "snapshot"):
    sys.path.insert(0, str(_TESTS / room))

from rdma_mig.migration import state  # noqa: E402
from rdma_mig.migration.status import MigrationState  # noqa: E402


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[MigrationState]:
    """The process's one migration, with nothing set; what is started on it is closed."""
    fresh = MigrationState()
    monkeypatch.setattr(state, "_current", fresh)
    yield fresh
    last = state.migrate_get_current().migration
    if last is not None:
        last.close()
