# SPDX-License-Identifier: Apache-2.0
"""A hundred connections with a peer that changes what it says; `make fuzz-live` makes more."""

from __future__ import annotations

import random

import pytest
import rdma_fuzz
import rdma_soak

from rdma_mig.wire.control import ControlMessage, ControlType

pytestmark = pytest.mark.rdma


@pytest.mark.deadline(200)
def test_hundred_connections_end_as_they_may_and_leave_nothing(address: str):
    report = rdma_soak.soak(100, seed=1, trial=rdma_fuzz.one)
    assert report.runs == 100
    assert (report.wrong, report.hangs, report.leaks) == ([], [], {})
    # Most of what is changed breaks something; some of it is noise that a peer may say.
    assert report.failed > 50
    assert report.completed > 5


def test_messages_are_really_changed():
    """What it says is, most of the time, something else than what it was told to say."""

    class Silent:
        def __init__(self) -> None:
            self.said: list[bytes] = []

        def send(self, raw: bytes, *, wait: bool = True) -> None:
            self.said.append(raw)

    plain = ControlMessage(ControlType.QEMU_FILE, bytes(range(64)), repeat=0)
    changed, kinds = 0, set()
    for seed in range(200):
        peer = Silent()
        send = rdma_fuzz.Changed(peer, random.Random(seed), 1)
        send(plain)
        assert peer.said == [plain.encode()]
        send(plain)
        changed += peer.said[1:] != [plain.encode()]
        kinds.update(done.partition(" in ")[0] for done in send.done)
    assert changed > 180
    assert len(kinds) == len(rdma_fuzz._CHANGES)
