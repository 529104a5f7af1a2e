# SPDX-License-Identifier: Apache-2.0
"""Guests whose RAM is a file that both ends share (capability x-ignore-shared)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import (
    Guest,
    Qemu,
    differences,
    free_port,
    guest_counters,
    heartbeats_in,
    read_blocks,
    snapshot_blocks,
)
from support import Incoming, assert_survives, outgoing, patience, rdma_uri

from rdma_mig.cli.main import main as rdma_migrate

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]

GUEST = Guest.dirtying(4)
NAMED_BY_PATH = "x-use-canonical-path-for-ramblock-id"


class Sharing(Qemu):
    """A QEMU that ignores shared RAM, and has that of another one.

    Args:
        of: the QEMU whose file is its RAM too; None for a new one.
        backend_name: name the block by the path of its memory backend.
    """

    def __init__(self, name: str, *, of: Qemu | None = None, backend_name: bool = False) -> None:
        self._of = of
        self._backend_name = backend_name
        super().__init__(
            machine="q35", guest=GUEST, name=name, incoming="defer" if of else None,
            timeout=patience(60),
        )  # fmt: skip
        self.set_capability("x-ignore-shared")

    def _write_files(self, owner: tuple[int, int] | None) -> None:
        super()._write_files(owner)
        if self._of is not None:
            self.memory_path.unlink()
            os.link(self._of.memory_path, self.memory_path)

    def _arguments(
        self, paused: bool, incoming: str | None, accel: str, extra: Sequence[str]
    ) -> list[str]:
        arguments = super()._arguments(paused, incoming, accel, extra)
        if self._backend_name:
            arguments = [re.sub(rf"({NAMED_BY_PATH}=)off", r"\1on", one) for one in arguments]
        return arguments


@pytest.mark.deadline(240)
@pytest.mark.parametrize(
    ("name", "pin_all"),
    [("pc.ram", True), ("/objects/pc.ram", False)],
    ids=["pin-all-longest", "dynamic-backend"],
)
def test_guest_goes_on_in_the_memory_that_stayed(name, pin_all, tmp_path, capsys):
    """Out of a QEMU, from directory to directory, and into a QEMU that has the same file."""
    first, second = tmp_path / "first", tmp_path / "second"
    backend_name = name.startswith("/objects/")
    with Incoming(first) as into_first, Sharing("source", backend_name=backend_name) as source:
        source.set_capability("rdma-pin-all", pin_all)
        source.wait_heartbeat(3)
        source.migrate(into_first.uri)
        source.wait_migration()
        done = into_first.succeed().event("completed")
        warning = into_first.event("warning")["message"]
        assert f"{name} is taken as shared" in warning
        listed = [block.name for block in source.ram_blocks()]

        manifest = json.loads((first / "manifest.json").read_text())
        assert manifest["version"] == 2
        (shared,) = manifest["shared_blocks"]
        assert (shared["name"], shared["length"]) == (name, source.memory_size)
        assert shared["guest_address"] == 0
        names = [block["name"] for block in manifest["blocks"]]
        assert sorted([*names, name]) == sorted(listed)
        assert done["bytes"] == sum(block["length"] for block in manifest["blocks"])
        assert len(list((first / "ram").glob("*.raw"))) == len(names)
        if not backend_name:
            blocks = read_blocks(source)
            del blocks[name]
            assert differences(blocks, snapshot_blocks(first)) == []
        assert rdma_migrate(["inspect", "--verify", str(first)]) == 0
        shown = capsys.readouterr().out
        assert "(format 2)" in shown
        assert any(name in row and "shared" in row for row in shown.splitlines())

        with Incoming(second) as into_second, outgoing(first, into_second.uri) as to_second:
            to_second.succeed()
            into_second.succeed()
        equal = subprocess.run(
            ["diff", "-r", first, second], capture_output=True, text=True, check=False
        )
        assert (equal.returncode, equal.stdout + equal.stderr) == (0, "")

        stopped = guest_counters(source.memory(), GUEST)
        with Sharing("destination", of=source, backend_name=backend_name) as dest:
            uri = rdma_uri(free_port())
            dest.migrate_incoming(uri)
            with outgoing(second, uri) as to_qemu:
                to_qemu.succeed()
            assert dest.wait_migration()["status"] == "completed"
            dest.wait_status("running")
            dest.wait_heartbeat(3)
            printed = heartbeats_in(source.serial() + dest.serial())
            assert printed == list(range(1, len(printed) + 1))
            dest.stop()
            assert guest_counters(dest.memory(), GUEST).passes > stopped.passes


def test_wrong_word_leaves_the_guest_to_its_source(tmp_path: Path):
    """The stream does not say which are shared: a mistake ends in setup, and names the option."""
    with Sharing("source") as source:
        source.wait_heartbeat(2)
        with Incoming(tmp_path / "vm", "--shared-block", "none") as into:
            source.migrate(into.uri)
            said = into.fail(1)
            assert "no block was taken as shared (as named)" in said
            assert "--shared-block NAME" in said
        assert_survives(source)
        with Incoming(tmp_path / "vm", "--shared-block", "pc.rom") as into:
            source.migrate(into.uri)
            assert "pc.rom was taken as shared (as named)" in into.fail(1)
        assert_survives(source)
        with Incoming(tmp_path / "vm", "--shared-block", "mem0") as into:
            source.migrate(into.uri)
            said = into.fail(2)
            assert "lists no such RAM block" in said
            assert "pc.ram" in said
        assert_survives(source)
        assert list(tmp_path.iterdir()) == []


def test_qemu_itself_does_not_take_shared_blocks_over_rdma(tmp_path: Path):
    """Why outgoing leaves them out of the list towards a QEMU: 7.2 ends when they are in it."""
    uri = rdma_uri(free_port())
    with Sharing("source") as source, Sharing("destination", of=source) as dest:
        source.wait_heartbeat(2)
        dest.migrate_incoming(uri)
        source.migrate(uri)
        assert dest.wait_exit() == 1
        assert "RAMBlock 'pc.ram' not found on destination" in dest.stderr()
        source.wait_migration(expect="failed")
