# SPDX-License-Identifier: Apache-2.0
"""A real QEMU that is slow is not dead: only --stall-timeout ends it.

The limit on a peer that is gone is 15 s; each wait here is longer, by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Qemu
from support import MIB, Incoming, assert_survives, patience

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]

#: Seconds: beyond the limit on a peer that is gone.
LONG = 20.0


@pytest.fixture
def pausing(source: Qemu) -> Iterator[Qemu]:
    """A source that stops before it hands over, until it is told to go on."""
    source.set_capability("pause-before-switchover")
    yield source
    source.set_capability("pause-before-switchover", False)


def into_the_pause(source: Qemu, incoming: Incoming) -> None:
    source.migrate(incoming.uri)
    source.wait(
        "the pause", lambda: source.query_migrate()["status"] == "pre-switchover", patience(60)
    )


def test_source_that_is_held_before_the_switchover(pausing: Qemu, tmp_path: Path):
    with Incoming(tmp_path / "kept") as incoming:
        into_the_pause(pausing, incoming)
        time.sleep(LONG)
        assert incoming.process.poll() is None, incoming.epitaph()
        assert pausing.query_migrate()["status"] == "pre-switchover"
        pausing.qmp("migrate-continue", state="pre-switchover")
        pausing.wait_migration()
        incoming.succeed()
        pausing.cont()
    assert (tmp_path / "kept" / "manifest.json").exists()


def test_source_that_is_held_too_long_for_the_stall_timeout(pausing: Qemu, tmp_path: Path):
    with Incoming(tmp_path / "kept", "--stall-timeout", "3") as incoming:
        into_the_pause(pausing, incoming)
        line = incoming.fail(5, patience(10))
        # It had stopped its guest for the switchover, and notices the end when it goes on.
        if pausing.query_migrate()["status"] == "pre-switchover":
            pausing.qmp("migrate-continue", state="pre-switchover")
        assert_survives(pausing)
    assert "within 3 s" in line
    assert "still the source's" in line
    assert "--stall-timeout" in line
    assert list(tmp_path.iterdir()) == []


def test_source_at_a_mebibyte_a_second(source: Qemu, tmp_path: Path):
    with Incoming(tmp_path / "kept", "--stall-timeout", "10") as incoming:
        source.set_parameter("max-bandwidth", MIB)
        source.migrate(incoming.uri)
        incoming.wait_event("progress", phase="round", done=1)
        time.sleep(LONG)
        assert incoming.process.poll() is None, incoming.epitaph()
        assert source.query_migrate()["status"] == "active"
        source.set_parameter("max-bandwidth", 0)
        source.wait_migration()
        incoming.succeed()
        source.cont()
