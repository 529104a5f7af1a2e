# SPDX-License-Identifier: Apache-2.0
"""Makes the kits of the tests importable, and gives a test a migration of its own."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parents[1]
for room in ("", "migration", "rdma", "snapshot"):
    sys.path.insert(0, str(_TESTS / room))

from live_kit import BLOCKS, MIB, WritingGuest, socket_ends  # noqa: E402

from rdma_mig.channel.qemufile import QEMUFile  # noqa: E402
from rdma_mig.migration import state  # noqa: E402
from rdma_mig.migration.status import MigrationState  # noqa: E402
from rdma_mig.waits import Cancel  # noqa: E402


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[MigrationState]:
    """The process's one migration, with nothing set; what is started on it is closed."""
    fresh = MigrationState()
    monkeypatch.setattr(state, "_current", fresh)
    yield fresh
    last = state.migrate_get_current().migration
    if last is not None:
        last.close()


@pytest.fixture
def guest():
    with WritingGuest(BLOCKS) as guest:
        with guest.ram[0].memory.view() as view:
            view[MIB : 9 * MIB] = b"data" * (2 * MIB)
        yield guest


@pytest.fixture
def connection():
    """Two ends of a stream; the first is a file to save to, the second one to load from."""
    ends = socket.socketpair()
    with Cancel() as cancel:
        yield [QEMUFile(end) for end in socket_ends(ends, cancel, cancel)]
    for end in ends:
        end.close()


@pytest.fixture
def receiver(connection):
    """The other end: a process of its own would be as good, but this one can be looked into."""
    from rdma_mig.migration.load import LiveDestination
    from rdma_mig.migration.state import Migration

    with WritingGuest(BLOCKS) as guest, Migration() as migration:
        file = connection[1]
        engine = LiveDestination(guest)
        migration.run(lambda: engine.process(migration, file, file.channel), "receiver")
        yield guest
