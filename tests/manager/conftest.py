# SPDX-License-Identifier: Apache-2.0
"""The commands that drive real QEMUs by QMP, on this machine: no device and no lab."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

from manager_kit import driven, socket_of
from support import Command


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A running guest as a snapshot."""
    directory = tmp_path_factory.mktemp("stored")
    with driven(directory) as source:
        source.wait_heartbeat(2)
        with Command("checkpoint", "--qmp", socket_of(source), directory / "vm") as command:
            command.succeed()
    return directory / "vm"
