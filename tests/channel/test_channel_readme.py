# SPDX-License-Identifier: Apache-2.0
"""The commands of README's section "Without RDMA", as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from channel_kit import GUEST, assert_runs_on, assert_same_memory
from harness import Qemu
from support import Command

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_commands_of_the_readme(tmp_path: Path):
    [text] = re.findall(r"^## Without RDMA\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    here = "".join(blocks).replace("/var/lib/vm", str(tmp_path)).replace("/var/tmp", str(tmp_path))
    here = here.replace("/tmp/vm.sock", f"{tmp_path}/vm.sock")
    here = here.replace("/tmp/restore.sock", f"{tmp_path}/restore.sock")
    receive, send, there, back = [shlex.split(line)[1:] for line in here.splitlines()]

    with Qemu(guest=GUEST, name="source") as source:
        source.wait_heartbeat(2)
        with Command(*receive) as incoming:
            source.wait("a socket", (tmp_path / "vm.sock").exists)
            source.migrate(f"unix:{tmp_path}/vm.sock")
            source.wait_migration()
            incoming.succeed()
        assert_same_memory(tmp_path / "web1", bytes(source.memory()[:]))

    with Qemu(guest=GUEST, name="target", incoming=f"unix:{tmp_path}/restore.sock") as target:
        with Command(*send) as outgoing:
            outgoing.succeed()
        assert_runs_on(target)
        target.migrate(f"exec:cat > {tmp_path}/stream")
        target.wait_migration()
        memory = bytes(target.memory()[:])

    with Command("inspect", tmp_path / "stream") as inspect:
        assert "pc.ram" in inspect.succeed().stdout
    for each in (there, back):
        with Command(*each) as convert:
            convert.succeed()
    assert_same_memory(tmp_path / "web2", memory)
    with Command("inspect", tmp_path / "stream2") as inspect:
        assert "pc.ram" in inspect.succeed().stdout
