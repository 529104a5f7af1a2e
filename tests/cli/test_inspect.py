# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate inspect`` on a kept guest."""

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "snapshot"))

import snapshot_kit as kit
from harness.output import check_output

from rdma_mig.cli import inspect
from rdma_mig.errors import SnapshotError
from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.snapshot import SharedBlock, SnapshotWriter

MIB = 1 << 20


def run(*arguments):
    parser = argparse.ArgumentParser()
    inspect.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["inspect", *map(str, arguments)])
    return args.run(args)


@pytest.fixture
def kept(tmp_path):
    with kit.guest() as memories:
        return kit.keep(tmp_path / "vm", memories)


def test_text(kept, capsys):
    assert run(kept) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    assert ["snapshot", str(kept), "(format", "1)"] in lines
    assert ["machine", "pc-q35-7.2"] in lines
    assert "8.1 MiB in 3 blocks, 1.1 MiB of it not zero" in out
    rows = {row[1]: row for row in lines if len(row) == 7 and row[0].isdecimal()}
    assert rows["pc.ram"][2:6] == ["5.0", "MiB", "1.0", "MiB"]
    assert rows["pc.rom"][2:6] == ["3.0", "MiB", "0", "KiB"]
    assert ["timer", "0", "2", "timer"] in lines
    assert ["0000:00:02.0/e1000e", "1", "-", "-"] in lines
    digest = hashlib.sha256((kept / "config.bin").read_bytes()).hexdigest()
    assert ["config.bin", str(len(kit.HEAD)), digest] in lines
    assert "agrees" not in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_json(kept, capsys):
    assert run(kept, "--json") == 0
    report = check_output("inspect", json.loads(capsys.readouterr().out))
    manifest = json.loads((kept / "manifest.json").read_bytes())
    assert report["path"] == str(kept)
    assert report["format_version"] == 1
    assert report["machine"] == "pc-q35-7.2"
    assert report["stream"] == {"ram_section_id": 2, "footers": True, "page_bits": 12}
    assert report["ram"]["length"] == sum(block.length for block in kit.BLOCKS)
    assert report["ram"]["data_bytes"] == MIB + 3 * 4096 + 100_000
    assert report["ram"]["blocks"][1] == {
        "index": 1,
        "name": "/rom@etc/acpi/tables",
        "length": 100_000,
        "data_bytes": 100_000,
        "page_size": 4096,
        "guest_address": None,
        "digests_sha256": manifest["blocks"][1]["digests"]["sha256"],
    }
    assert report["config"] == manifest["files"]["config.bin"]
    assert report["device_state"] == manifest["files"]["vmstate.bin"]
    assert report["description"] == manifest["files"]["vmdesc.json"] | {
        "page_size": 4096,
        "error": None,
        "devices": [
            {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2},
            {
                "name": "0000:00:02.0/e1000e",
                "instance_id": 1,
                "vmsd_name": None,
                "version": None,
            },
        ],
    }
    assert report["verified"] is None


def test_shared_blocks(tmp_path, capsys):
    shared = SharedBlock(1, RamBlock("mem\x1b0", 4 * MIB, guest_address=0))
    with kit.guest() as memories, SnapshotWriter(tmp_path / "vm") as writer:
        kit.fill(writer, memories)
        kept = kit.commit(writer, replace(kit.FACTS, shared=(shared,)))
    assert run(kept, "--verify") == 0
    out = capsys.readouterr().out
    assert "(format 2)" in out
    assert "8.1 MiB in 3 blocks" in out
    row = next(line for line in out.splitlines() if "mem\\x1b0" in line)
    assert "4.0 MiB" in row
    assert "shared" in row
    assert run(kept, "--json") == 0
    report = check_output("inspect", json.loads(capsys.readouterr().out))
    assert report["format_version"] == 2
    assert [block["name"] for block in report["ram"]["blocks"]] == [b.idstr for b in kit.BLOCKS]
    assert report["ram"]["shared_blocks"] == [
        {
            "position": 1,
            "name": "mem\x1b0",
            "length": 4 * MIB,
            "page_size": None,
            "guest_address": 0,
        }
    ]


def test_verify(kept, capsys):
    assert run(kept, "--verify") == 0
    assert "every byte agrees with its digest" in capsys.readouterr().out
    assert run(kept, "--verify", "--json") == 0
    report = check_output("inspect", json.loads(capsys.readouterr().out))
    assert report["verified"] is True
    with (kept / "ram/0.raw").open("r+b") as file:
        file.seek(2 * MIB + 4095)
        file.write(b"\x03")
    assert run(kept) == 0, "without --verify RAM is not read"
    capsys.readouterr()
    with pytest.raises(SnapshotError, match=r"pc\.ram.* at offset 0x200000") as caught:
        run(kept, "--verify")
    assert caught.value.exit_status == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("description", "told"),
    [
        (None, "the source sent no description"),
        (b"{}", "page_size"),
        (b"{not json", "JSON"),
    ],
)
def test_without_known_devices(tmp_path, capsys, description, told):
    with kit.guest() as memories:
        kept = kit.keep(tmp_path / "vm", memories, description=description)
    assert run(kept, "--verify") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("devices"))
    assert told in line
    assert run(kept, "--json") == 0
    report = check_output("inspect", json.loads(capsys.readouterr().out))["description"]
    assert report is None if description is None else report["devices"] is None
    assert description is None or told in report["error"]


def test_what_the_source_named_does_not_reach_the_terminal_raw(tmp_path, capsys):
    block = RamBlock("pc\x1b]0;x\x07\udc80\n.ram", 4096)
    description = json.dumps(
        {"page_size": 4096, "devices": [{"name": "a\x1b[2Jb", "instance_id": 0}]}
    ).encode()
    with GuestMemory(block.length, "x") as memory:
        kept = kit.keep(tmp_path / "vm", [memory], (block,), description=description)
    assert run(kept) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert r"pc\x1b]0;x\x07\udc80\n.ram" in out
    assert run(kept, "--json") == 0
    report = check_output("inspect", json.loads(capsys.readouterr().out))
    assert report["ram"]["blocks"][0]["name"] == block.idstr


@pytest.mark.parametrize("flags", [(), ("--json",), ("--verify",)])
def test_what_is_no_snapshot(tmp_path, capsys, flags):
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        run(tmp_path / "vm", *flags)
    assert capsys.readouterr().out == ""
