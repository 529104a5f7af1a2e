# SPDX-License-Identifier: Apache-2.0
"""What an operator sees where a QEMU refuses IPv6 on RoCE (up to 10.0), at our end."""

from __future__ import annotations

import ipaddress
import signal
from pathlib import Path

import pytest
from harness import HarnessError, Qemu, device_address, free_port
from support import Incoming, Snapshot, assert_survives, outgoing, prompt

from rdma_mig.verbs.route import gids

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]


@pytest.fixture
def ipv6() -> str:
    """An IPv6 address of the device under test, of more than one link."""
    device, _address = device_address()
    for gid in gids(device, 1)[1]:
        if ":" in gid.address and not ipaddress.IPv6Address(gid.raw).is_link_local:
            return gid.address
    pytest.fail(f"{device} has no IPv6 address beside the link-local one")


def test_source_that_refuses_our_address(ipv6: str, source: Qemu, tmp_path: Path):
    """We hear nothing of it, so it is said before; and its guest does not notice."""
    with Incoming(tmp_path / "kept", uri=f"rdma:[{ipv6}]:0") as incoming:
        assert "listen at an IPv4 address" in incoming.wait_event("warning")["message"]
        with pytest.raises(HarnessError, match=r"(?i)ipv6"):
            source.migrate(incoming.uri)
        assert_survives(source)
        assert [event["event"] for event in incoming.events()] == ["warning", "listening"]
        incoming.signal(signal.SIGTERM)
        incoming.fail(5, prompt())
    assert list(tmp_path.iterdir()) == []


def test_destination_that_does_not_listen_there(ipv6: str, snapshot: Snapshot):
    with Qemu(incoming="defer", paused=True, **snapshot.machine) as destination:
        uri = f"rdma:[{ipv6}]:{free_port()}"
        with pytest.raises(HarnessError, match=r"(?i)ipv6"):
            destination.migrate_incoming(uri)
        with outgoing(snapshot.directory, uri) as command:
            line = command.fail(1)
    assert "nobody listens" in line
    assert "if that is a QEMU, give its IPv4 address" in line
    assert f"the snapshot in {snapshot.directory} is unchanged" in line
