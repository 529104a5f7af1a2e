# SPDX-License-Identifier: Apache-2.0
"""Where `make bench` puts snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk import MIB, filesystem, image_size, on_image


def test_file_system_is_named():
    assert filesystem(Path("/proc/self")) == "proc"


@pytest.mark.parametrize("mib", [64, 256, 2048])
def test_image_has_room_for_two_snapshots(mib):
    # Beside RAM, a snapshot has the memory of devices: some 20 MiB; ext4 keeps 5 % to itself.
    assert 0.95 * image_size(mib * MIB) >= 2 * (mib + 64) * MIB


@pytest.mark.root
@pytest.mark.full
def test_image_is_a_file_system_of_its_own_and_leaves_nothing(tmp_path: Path):
    before = set(Path("/dev/shm").iterdir())
    outside = filesystem(tmp_path)
    with on_image(tmp_path, 128 * MIB):
        assert filesystem(tmp_path) == "ext4"
        (tmp_path / "file").write_bytes(b"kept")
    assert filesystem(tmp_path) == outside
    assert not (tmp_path / "file").exists()
    assert set(Path("/dev/shm").iterdir()) == before
