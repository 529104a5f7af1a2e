# SPDX-License-Identifier: Apache-2.0
"""Which device and GID a connection takes, on a host that has several."""

from __future__ import annotations

import ipaddress
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rdma_command as command
import rdma_kit as kit
from harness.device import device_address

from rdma_mig.errors import HostError, PeerGone
from rdma_mig.verbs import listener as listening
from rdma_mig.verbs.connector import connect
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.verbs.host import devices
from rdma_mig.verbs.route import gids, route_of
from rdma_mig.waits import Cancel

pytestmark = [pytest.mark.rdma, pytest.mark.root]

CLASS = Path("/sys/class/infiniband")


@pytest.fixture
def mine() -> str:
    """The device under test."""
    return kit.device()[0]


@pytest.fixture
def other(mine: str) -> tuple[str, str]:
    """Another device with an IPv4 address."""
    for name in devices():
        if name != mine and not (CLASS / name / "node_type").read_text().startswith("4"):
            return device_address(name)
    pytest.fail("this host has one device only: rdma link add NAME type rxe netdev INTERFACE")


def index_of(device: str, address: str) -> int:
    return next(gid.index for gid in gids(device, 1)[1] if gid.address == address)


@pytest.fixture
def second_address(mine: str) -> Iterator[tuple[str, int]]:
    """Another IPv4 address of the device under test, and its GID's index."""
    interface = (CLASS / mine / "ports/1/gid_attrs/ndevs/0").read_text().strip()
    address = str(ipaddress.IPv4Address(kit.device()[1]) + 0x40)
    ip = ["ip", "addr", "add", f"{address}/24", "dev", interface]
    subprocess.run(ip, check=True)
    try:
        end = time.monotonic() + kit.patience(5)
        while address not in [gid.address for gid in gids(mine, 1)[1]]:
            assert time.monotonic() < end, "its GID does not appear"
            time.sleep(0.05)
        yield address, index_of(mine, address)
    finally:
        subprocess.run([*ip[:2], "del", *ip[3:]], check=True)


# ---- what there is not ----


def refused(kept: Path, room: Path, *options: str, status: int = 3, prefix: tuple = ()) -> str:
    """Both ends refuse the options in the same words, and before they do anything."""
    lines = []
    for arguments in (["outgoing", kept], ["incoming", "-o", room / "vm"]):
        result = command.run(*arguments, "rdma:192.0.2.1:1", *options, prefix=prefix)
        lines.append(command.failed(result, status))
    assert lines[0] == lines[1]
    assert list(room.iterdir()) == []
    return lines[0]


def test_device_that_is_not_there(kept, room, mine, other):
    line = refused(kept, room, "--rdma-device", "mlx9_9")
    assert "no RDMA device 'mlx9_9'" in line
    assert mine in line
    assert other[0] in line


def test_index_without_a_device(kept, room, mine, other):
    line = refused(kept, room, "--gid-index", "1", status=2)
    assert "--rdma-device" in line
    assert mine in line
    assert other[0] in line


@pytest.mark.parametrize("index", ["-1", "x", "1.0", "", "123456"])
def test_index_that_is_no_number(kept, room, mine, index):
    for arguments in (["outgoing", kept], ["incoming", "-o", room / "vm"]):
        result = command.run(
            *arguments, "rdma:192.0.2.1:1", "--rdma-device", mine, f"--gid-index={index}"
        )
        assert "is no index" in command.failed(result, 2)


def test_index_beyond_the_table(kept, room, mine, address):
    length, _found = gids(mine, 1)
    line = refused(kept, room, "--rdma-device", mine, "--gid-index", str(length))
    assert f"no GID index {length}, allowed are 0 to {length - 1}" in line
    assert f"{index_of(mine, address)}: {address} (RoCE v2)" in line


def test_index_that_is_empty(kept, room, mine, address):
    length, _found = gids(mine, 1)
    line = refused(kept, room, "--rdma-device", mine, "--gid-index", str(length - 1))
    assert f"GID index {length - 1} of {mine} is empty" in line
    assert f"{index_of(mine, address)}: {address} (RoCE v2)" in line


def arranged(mine: str, tmp_path: Path, entry: str, content: str) -> list[str]:
    """A prefix for a command that shall find this in the device's directory."""
    (tmp_path / "entry").write_text(f"{content}\n")
    return command.replaced({str((CLASS / mine).resolve() / entry): tmp_path / "entry"})


def test_index_of_roce_v1(kept, room, mine, address, tmp_path):
    index = index_of(mine, address)
    prefix = arranged(mine, tmp_path, f"ports/1/gid_attrs/types/{index}", "IB/RoCE v1")
    options = ("--rdma-device", mine, "--gid-index", str(index))
    line = refused(kept, room, *options, prefix=tuple(prefix))
    assert f"GID index {index} of {mine} is of RoCE v1" in line
    assert "(RoCE v1)" in line
    assert "(RoCE v2)" in line


def test_index_on_infiniband(kept, room, mine, address, tmp_path):
    prefix = arranged(mine, tmp_path, "ports/1/link_layer", "InfiniBand")
    options = ("--rdma-device", mine, "--gid-index", str(index_of(mine, address)))
    line = refused(kept, room, *options, prefix=tuple(prefix))
    assert f"{mine} is an InfiniBand device" in line


# ---- the source's end ----


def test_source_takes_the_device_that_it_is_told_to(kept, room, other):
    """Told and shown, at both ends and in both forms."""
    device, address = other
    index = index_of(device, address)
    options = ["--rdma-device", device, "--gid-index", str(index)]
    with command.incoming("rdma:0.0.0.0:0", room / "vm", *options) as destination:
        port = destination.uri.rpartition(":")[2]
        sent = command.run("outgoing", kept, f"rdma:{address}:{port}", "-v", *options)
        assert sent.returncode == 0, sent.stderr
        connected = command.event(destination.events(), "connected")
    assert (connected["device"], connected["gid_index"]) == (device, index)
    assert connected["gid"] == f"::ffff:{address}"
    assert connected["local"] == f"{address}:{port}"
    route = next(line for line in sent.stderr.splitlines() if line.startswith("route: "))
    assert route == (
        f"route: {connected['peer']} to {address}:{port} over {device} port 1, RoCE v2, "
        f"GID {index} (::ffff:{address}), MTU {connected['mtu']}"
    )


def test_source_told_to_take_a_device_that_does_not_lead_there(kept, address, other):
    """Within one network namespace nothing goes from one device to another's address."""
    with kit.RawListener() as listener:
        result = command.run("outgoing", kept, listener.uri, "--rdma-device", other[0])
    line = command.failed(result, 3)
    assert f"is reached over {kit.device()[0]}, not over {other[0]}" in line


def test_source_told_to_take_the_address_of_another_family(kept, mine, address):
    index = next(gid.index for gid in gids(mine, 1)[1] if ":" in gid.address)
    result = command.run(
        "outgoing", kept, f"rdma:{address}:1", "--rdma-device", mine, "--gid-index", str(index)
    )
    line = command.failed(result, 3)
    assert f"cannot reach {address}, which is IPv4" in line
    assert f"{index_of(mine, address)}: {address} (RoCE v2)" in line


def test_source_connects_from_the_address_of_the_index(mine, address, second_address):
    ours, index = second_address
    options = EndpointOptions(device=mine, gid_index=index)
    with kit.RawListener() as listener, Cancel() as cancel:
        accepted = kit.Worker(listener.accept)
        endpoint = connect(*listener.listener.address, kit.PLAIN, cancel, options)
        with endpoint:
            accepted.result()
            route = route_of(endpoint.cmid, endpoint.path)
            assert route.local.startswith(f"{ours}:")
            assert (route.gid_index, route.gid) == (index, f"::ffff:{ours}")
            assert listener.peer.endpoint.peer == route.local


# ---- the destination's end ----


def test_destination_at_an_address_of_another_device(room, address, other):
    result = command.run(
        "incoming", f"rdma:{address}:0", "-o", room / "vm", "--rdma-device", other[0]
    )
    line = command.failed(result, 3)
    assert f"{address} is an address of {kit.device()[0]}, not of {other[0]}" in line
    assert f"{other[1]} (RoCE v2)" in line


def test_destination_at_another_address_than_the_index(mine, address, second_address):
    ours, index = second_address
    options = EndpointOptions(device=mine, gid_index=index)
    with (
        Cancel() as cancel,
        pytest.raises(HostError, match=rf"{address} is not the address of GID index {index} "),
    ):
        listening.Listener(address, 0, cancel, options)
    with kit.RawListener(options, host=ours) as listener:
        assert listener.listener.address[0] == ours


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The clients that a listener has built a queue pair for."""
    clients: list[str] = []

    class Noted(listening.Endpoint):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            clients.append(self.peer)

    monkeypatch.setattr(listening, "Endpoint", Noted)
    return clients


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::"])
def test_request_over_another_device_is_turned_away(address, other, built, everywhere):
    device, wanted = other
    with kit.RawListener(EndpointOptions(device=device), host=everywhere) as listener:
        port = listener.listener.address[1]
        accepted = kit.Worker(listener.accept)
        for _ in range(2):
            with (
                pytest.raises(PeerGone, match=f"connections are taken over device {device} only"),
                kit.dial(f"rdma:{address}:{port}"),
            ):
                pytest.fail("it was accepted")
        assert built == []
        with kit.dial(f"rdma:{wanted}:{port}") as peer:
            assert accepted.result().endpoint.device == device
            assert built == [peer.endpoint.local]


def test_request_to_another_gid_is_turned_away(mine, address, second_address, built):
    ours, index = second_address
    options = EndpointOptions(device=mine, gid_index=index)
    with kit.RawListener(options, host="0.0.0.0") as listener:
        port = listener.listener.address[1]
        accepted = kit.Worker(listener.accept)
        with (
            pytest.raises(PeerGone, match=f"connections are taken at {ours} only"),
            kit.dial(f"rdma:{address}:{port}"),
        ):
            pytest.fail("it was accepted")
        assert built == []
        with kit.dial(f"rdma:{ours}:{port}"):
            endpoint = accepted.result().endpoint
            assert route_of(endpoint.cmid, endpoint.path).gid_index == index
