# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate doctor`` on a host with a device, and between two hosts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import rdma_command as command
import rdma_kit as kit
from harness.output import check_output

pytestmark = pytest.mark.rdma


def examined(*options: str, status: int = 0, prefix: list[str] | None = None) -> dict[str, list]:
    """The findings of each check."""
    device, _address = kit.device()
    result = command.run("doctor", "--json", "--rdma-device", device, *options, prefix=prefix or [])
    assert result.returncode == status, result.stdout + result.stderr
    by_check: dict[str, list] = {}
    for finding in json.loads(result.stdout)["findings"]:
        by_check.setdefault(finding["check"], []).append(finding)
    return by_check


def test_host_that_can_migrate():
    device, address = kit.device()
    found = examined("--ram", "64M")
    assert all(f["level"] == "ok" for findings in found.values() for f in findings), found
    assert re.match(rf"{device} port \d+ is active \(RoCE, ", found["port"][0]["message"])
    assert f"{address} " in found["gid"][0]["message"]
    assert re.search(rf"GID index \d+ of {device} \(RoCE v2\)", found["gid"][0]["message"])
    assert re.match(r"pyverbs loads, with libibverbs \d+", found["libraries"][0]["message"])
    assert found["modules"][0]["message"] == "the kernel has ib_uverbs and rdma_ucm"
    assert re.search(r"registers up to \d+ regions", found["registration"][0]["message"])


@pytest.mark.root
def test_port_that_is_down_is_a_blocker(tmp_path):
    device, _address = kit.device()
    state = tmp_path / "state"
    state.write_text("1: DOWN\n")
    prefix = command.replaced({f"/sys/class/infiniband/{device}/ports/1/state": state})
    [port] = examined(status=3, prefix=prefix)["port"]
    assert (port["level"], port["message"]) == ("blocker", f"{device} port 1 is DOWN (RoCE)")
    assert re.fullmatch(r"ip link set dev \S+ up", port["remedy"])


@pytest.mark.root
def test_device_without_an_ipv4_gid_is_a_blocker(tmp_path):
    device, _address = kit.device()
    empty = tmp_path / "gid"
    empty.write_text("0000:0000:0000:0000:0000:0000:0000:0000\n")
    table = Path(f"/sys/class/infiniband/{device}/ports/1/gids")
    named = {
        str(entry): empty
        for entry in table.iterdir()
        if entry.read_text().strip() != empty.read_text().strip()
    }
    assert named
    [gid] = examined(status=3, prefix=command.replaced(named))["gid"]
    assert gid["level"] == "blocker"
    assert "ip address add" in gid["remedy"]


def test_both_hosts_and_the_path_between_them(address):
    before = kit.resources()
    server = subprocess.Popen(
        [command.COMMAND, "doctor", "--serve", f"{address}:0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        peer = server.stderr.readline().split()[-1]
        asked = command.run("doctor", "--json", "--peer", peer)
        output, _ = server.communicate(timeout=kit.patience(30))
    finally:
        server.kill()
        server.communicate()
    assert (asked.returncode, server.returncode) == (0, 0), asked.stdout + asked.stderr
    ours, theirs = (check_output("doctor", json.loads(text)) for text in (asked.stdout, output))
    assert ours["path"] == theirs["path"]
    assert ours["path"]["level"] == "ok"
    device, _ = kit.device()
    assert re.match(
        rf"16 MiB arrived unchanged at some \d+ MiB/s: .* over {device} port 1, RoCE v2, "
        r"GID \d+ \(.*\), MTU \d+",
        ours["path"]["message"],
    )
    kit.settle(before)
