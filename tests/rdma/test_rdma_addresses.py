# SPDX-License-Identifier: Apache-2.0
"""Where to listen and whom to connect to: both families, names of several addresses, wildcards."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import time
from pathlib import Path

import pytest
import rdma_command as command
import rdma_kit as kit

from rdma_mig.verbs.route import gids

pytestmark = [pytest.mark.rdma, pytest.mark.root]

NAME = "destination.example"
ADVICE = "give its IPv4 address: up to 10.0 it refuses IPv6 on RoCE"


@pytest.fixture
def ipv6() -> str:
    """An IPv6 address of the device under test, of more than one link."""
    for gid in gids(kit.device()[0], 1)[1]:
        if ":" in gid.address and not ipaddress.IPv6Address(gid.raw).is_link_local:
            return gid.address
    pytest.fail(f"{kit.device()[0]} has no IPv6 address beside the link-local one")


@pytest.fixture
def named(tmp_path: Path):
    """A prefix with which a name has these addresses, and what getaddrinfo() makes of them."""

    def prefix(*addresses: str) -> list[str]:
        hosts = tmp_path / "hosts"
        hosts.write_text("".join(f"{address} {NAME}\n" for address in addresses))
        prefix = command.replaced({"/etc/hosts": hosts})
        shown = subprocess.run(
            [*prefix, "getent", "ahosts", NAME], check=True, capture_output=True, text=True
        ).stdout.split("\n")
        found = list(dict.fromkeys(line.split()[0] for line in shown if line))
        assert found == list(addresses), "the resolver sorts them in another way"
        return prefix

    return prefix


def port_of(uri: str) -> str:
    return uri.rpartition(":")[2]


# ---- IPv6 ----


def test_whole_migration_over_ipv6(room, kept, ipv6):
    with command.incoming(f"rdma:[{ipv6}]:0", room / "vm") as destination:
        assert destination.uri.startswith(f"rdma:[{ipv6}]:")
        # Said while nothing has happened yet: this end's peers will not all say why they fail.
        warning = command.event(destination.before, "warning")["message"]
        assert "QEMU up to 10.0 refuses IPv6 on RoCE" in warning
        assert destination.uri in warning
        sent = command.run("outgoing", kept, destination.uri, "--json")
        events = destination.events()
    assert sent.returncode == 0, sent.stderr
    assert "QEMU" not in sent.stdout, "the peer was none"
    for told in (events, [json.loads(line) for line in sent.stdout.splitlines()]):
        connected = command.event(told, "connected")
        assert connected["transport"] == "RoCE v2"
        assert connected["gid"] == ipv6
        assert connected["local"].startswith(f"[{ipv6}]:")
        assert connected["peer"].startswith(f"[{ipv6}]:")
    assert subprocess.run(["diff", "-r", kept, room / "vm"], check=False).returncode == 0


def test_nobody_listens_at_an_ipv6_address(kept, ipv6):
    line = command.failed(command.run("outgoing", kept, f"rdma:[{ipv6}]:1"), 1)
    assert f"nobody listens at [{ipv6}]:1" in line
    assert ADVICE in line


def test_nobody_listens_at_an_ipv4_address(kept, address):
    line = command.failed(command.run("outgoing", kept, f"rdma:{address}:1"), 1)
    assert "IPv6" not in line


# ---- every address ----


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::"])
def test_every_address(everywhere, address, ipv6):
    """[::] takes connections over IPv4 as well, and both come out under their own addresses."""
    for reached in [address] if everywhere == "0.0.0.0" else [address, ipv6]:
        with kit.RawListener(host=everywhere) as listener:
            bound, port = listener.listener.address
            assert bound == everywhere
            accepted = kit.Worker(listener.accept)
            host = f"[{reached}]" if ":" in reached else reached
            with kit.dial(f"rdma:{host}:{port}") as peer:
                accepted.result()
                assert listener.peer.endpoint.local == peer.endpoint.peer == f"{host}:{port}"
                assert listener.peer.endpoint.peer == peer.endpoint.local


def test_every_address_without_a_warning(room):
    for number, everywhere in enumerate(("0.0.0.0", "[::]")):
        with command.incoming(f"rdma:{everywhere}:0", room / f"vm{number}") as destination:
            assert [told["event"] for told in destination.before] == ["listening"]


# ---- names ----


def test_name_of_two_addresses_of_which_only_the_second_listens(room, kept, address, ipv6, named):
    with command.incoming(f"rdma:{address}:0", room / "vm") as destination:
        uri = f"rdma:{NAME}:{port_of(destination.uri)}"
        sent = command.run("outgoing", kept, uri, "--json", prefix=named(ipv6, address))
        assert sent.returncode == 0, sent.stderr
        destination.events()
    connected = command.event([json.loads(line) for line in sent.stdout.splitlines()], "connected")
    assert connected["peer"] == destination.uri.removeprefix("rdma:")


def test_address_that_does_not_answer_leaves_time_for_the_next(room, kept, address, ipv6, named):
    silent = str(ipaddress.IPv6Address(ipv6) + 0x77)
    with command.incoming(f"rdma:{address}:0", room / "vm") as destination:
        uri = f"rdma:{NAME}:{port_of(destination.uri)}"
        began = time.monotonic()
        sent = command.run("outgoing", kept, uri, prefix=named(silent, address))
        took = time.monotonic() - began
        assert sent.returncode == 0, sent.stderr
        destination.events()
    assert took > 4.5, "the first address was not tried"


def test_name_of_which_no_address_answers(kept, address, ipv6, named):
    uri = f"rdma:{NAME}:1"
    line = command.failed(command.run("outgoing", kept, uri, prefix=named(ipv6, address)), 1)
    assert f"no way to {NAME} is left" in line
    first, second = line.index(f"[{ipv6}]:1"), line.index(f"{address}:1")
    assert first < second


def test_name_of_an_ipv6_address_only(kept, ipv6, named):
    uri = f"rdma:{NAME}:1"
    assert ADVICE in command.failed(command.run("outgoing", kept, uri, prefix=named(ipv6)), 1)


def test_listening_at_a_name(room, address, ipv6, named):
    """The first address that is this host's; the other is somebody else's."""
    prefix = named(str(ipaddress.IPv6Address(ipv6) + 0x77), address)
    with command.incoming(f"rdma:{NAME}:0", room / "vm", prefix=prefix) as destination:
        assert destination.uri.startswith(f"rdma:{address}:")


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::"])
def test_name_that_is_every_address(room, kept, named, everywhere):
    prefix = named(everywhere)
    for arguments in (["incoming", f"rdma:{NAME}:0", "-o", room / "vm"],
                      ["outgoing", kept, f"rdma:{NAME}:1"]):  # fmt: skip
        line = command.failed(command.run(*arguments, prefix=prefix), 3)
        assert f"the name {NAME} resolves to {everywhere}" in line
    assert list(room.iterdir()) == []


# ---- link-local ----


def test_link_local_address_with_its_interface(room, kept):
    gid = next(gid for gid in gids(kit.device()[0], 1)[1] if "%" in gid.address)
    with kit.RawListener(host=gid.address) as listener:
        assert listener.listener.address[0] == gid.address
        accepted = kit.Worker(listener.accept)
        with kit.dial(listener.uri) as peer:
            accepted.result()
            assert peer.endpoint.local.startswith(f"[{gid.address}]:")
