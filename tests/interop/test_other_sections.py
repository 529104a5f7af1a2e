# SPDX-License-Identifier: Apache-2.0
"""A source that sends more than RAM before RAM's end: what it is has to be named, and refused.

Such a section carries no length, so nothing behind it could be understood.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Guest, Qemu
from support import Incoming, assert_survives, patience

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]


def test_dirty_bitmaps_are_refused_by_name(tmp_path: Path):
    """A disk's dirty bitmap is such a section, and the usual one on x86."""
    with (
        Incoming(tmp_path / "kept") as incoming,
        Qemu(
            guest=Guest.dirtying(4), name="source", timeout=patience(60),
            extra=["-blockdev", "driver=null-co,node-name=disk,size=16777216,read-zeroes=on"],
        ) as source,
    ):  # fmt: skip
        source.wait_heartbeat(2)
        source.qmp("block-dirty-bitmap-add", node="disk", name="since-backup")
        source.set_capability("rdma-pin-all")
        source.set_capability("dirty-bitmaps")
        source.migrate(incoming.uri)
        line = incoming.fail(4)
        assert_survives(source)
    assert "section 'dirty-bitmap' comes before the end of the RAM section" in line
    assert "take the device or capability that sends it away" in line
    assert "still the source's" in line
    assert list(tmp_path.iterdir()) == []
