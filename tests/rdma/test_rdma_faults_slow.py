# SPDX-License-Identifier: Apache-2.0
"""Peers that take their time at every step: they are waited for as long as their host answers."""

from __future__ import annotations

import time

import pytest
import rdma_kit as kit

from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.wire.control import ControlMessage, ControlType, FinalAck
from rdma_mig.wire.handshake import FEATURE_FINAL_ACK, Extension, PrivateData

pytestmark = pytest.mark.rdma

# A peer that is gone is noticed within 0.7 s; each step here takes twice as long.
EAGER = EndpointOptions(probe_seconds=0.1, silence_seconds=0.6)
SLOW = 1.4


@pytest.mark.deadline(60)
def test_source_that_is_slow_at_every_step(room):
    with kit.incoming(room / "vm", endpoint=EAGER) as end, kit.dial(end.uri) as peer:
        for _step in kit.act_as_source(peer):
            assert not end.migration.wait(SLOW), "it was given up"
        peer.close()
        end.succeed()


@pytest.mark.deadline(60)
def test_destination_that_is_slow_at_every_step_and_with_its_acknowledgement(kept):
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri, endpoint=EAGER) as end:
        peer = listener.accept(PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode())
        for _step in kit.act_as_destination(peer):
            assert not end.migration.wait(SLOW), "it was given up"
        peer.send(ControlMessage(ControlType.FINAL_ACK, FinalAck(0).encode()))
        end.succeed()


@pytest.mark.deadline(180)
@pytest.mark.parametrize(
    ("step", "seconds"),
    [("blocks asked for", 20), ("all received", 20), ("blocks asked for", 130)],
)
def test_destination_that_registers_or_writes_for_longer_than_a_dead_peer_is_given(
    kept, step, seconds
):
    """By the clock, with the limits as they are: a registration, and a slow disk."""
    with kit.RawListener() as listener, kit.outgoing(kept, listener.uri) as end:
        peer = listener.accept(PrivateData(1, 1, Extension(FEATURE_FINAL_ACK, 7)).encode())
        steps = kit.act_as_destination(peer)
        kit.until(step, steps)
        began = time.monotonic()
        assert not end.migration.wait(seconds), "it was given up"
        assert time.monotonic() - began >= seconds
        for _step in steps:
            pass
        peer.send(ControlMessage(ControlType.FINAL_ACK, FinalAck(0).encode()))
        end.succeed()
