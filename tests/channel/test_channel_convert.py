# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate convert``: nothing is lost or added on the way."""

from __future__ import annotations

import json
from pathlib import Path

from channel_kit import Stored, assert_same_memory
from harness.output import check_output
from support import Command


def files(directory: Path) -> dict[str, bytes]:
    """All that is in a snapshot."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "restored"
    }


def convert(source: Path, target: Path) -> Path:
    with Command("convert", source, target) as command:
        command.succeed()
    return target


def test_there_and_back_is_the_same_byte_for_byte(tmp_path: Path, stored: Stored):
    first = convert(stored.stream, tmp_path / "first")
    assert_same_memory(first, stored.memory)
    stream = convert(first, tmp_path / "stream")
    second = convert(stream, tmp_path / "second")
    a, b = files(first), files(second)
    a.pop("manifest.json", None), b.pop("manifest.json", None)
    assert a == b
    assert convert(second, tmp_path / "again").read_bytes() == stream.read_bytes()
    assert not (first / "restored").exists()


def test_target_that_exists_stays_as_it_is(tmp_path: Path, stored: Stored):
    target = tmp_path / "there"
    target.write_bytes(b"x")
    with Command("convert", stored.directory, target) as command:
        assert "exists" in command.fail(2)
    assert target.read_bytes() == b"x"


def test_inspect_reads_the_stream_of_a_qemu(tmp_path: Path, stored: Stored):
    with Command("inspect", stored.stream, "--json") as command:
        command.succeed()
        report = check_output("inspect-stream", json.loads(command.stdout))
    with Command("inspect", stored.directory, "--json") as command:
        command.succeed()
        kept = check_output("inspect", json.loads(command.stdout))
    assert report["machine"] == kept["machine"]
    assert report["devices"] == kept["description"]["devices"]
    assert report["ram"]["length"] == kept["ram"]["length"]
    assert report["device_state"].items() <= kept["device_state"].items()
    ram = report["ram"]
    assert ram["normal_pages"] + ram["duplicate_pages"] >= ram["length"] // 4096
    cut = tmp_path / "cut"
    cut.write_bytes(stored.stream.read_bytes()[:-1])
    with Command("inspect", cut) as command:
        assert "ends within the device state" in command.fail(4)
