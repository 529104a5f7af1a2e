# SPDX-License-Identifier: Apache-2.0
"""Traces of migrations from and to a real QEMU keep the rules that `trace check` knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Guest, Qemu, fill_random, free_port
from support import MIB, Incoming, outgoing, patience, rdma_uri

from rdma_mig.cli.main import main as rdma_migrate

pytestmark = [pytest.mark.rdma, pytest.mark.qemu]


@pytest.mark.parametrize("mode", ["pin-all", "dynamic", "return-path"])
def test_both_ways_keep_the_rules(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kept, came, went = tmp_path / "kept", tmp_path / "in", tmp_path / "out"
    port = free_port()
    pin_all = mode == "pin-all"

    def qemu(name: str, **options: object) -> Qemu:
        return Qemu(guest=Guest.idle(), memory_mib=64, name=name, timeout=patience(60), **options)

    with qemu("source") as source, qemu("destination", incoming="defer", paused=True) as dest:
        for each in (source, dest):
            each.set_capability("postcopy-ram", mode == "return-path")
        source.set_capability("rdma-pin-all", pin_all)
        source.wait_heartbeat(2)
        fill_random(source.memory_path, 1, 24 * MIB, 3 * MIB)
        with Incoming(kept, "--trace", str(came)) as incoming:
            source.migrate(incoming.uri)
            source.wait_migration()
            incoming.succeed()
        dest.qmp("migrate-incoming", uri=rdma_uri(port))
        back = ["--return-path"] if mode == "return-path" else []
        with outgoing(kept, rdma_uri(port), "--trace", str(went), *back, pin_all=pin_all) as sender:
            sender.succeed()
        assert dest.wait_migration()["status"] == "completed"
    for trace, role in ((came, "incoming"), (went, "outgoing")):
        assert rdma_migrate(["trace", "check", str(trace)]) == 0, capsys.readouterr().err
        assert f"{role}, " in capsys.readouterr().out
