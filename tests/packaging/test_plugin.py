# SPDX-License-Identifier: Apache-2.0
"""The example of docs/plugin.md, run as it stands there against ``rdma-migrate incoming``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import packaging_kit as kit
import pytest

sys.path.insert(0, str(kit.PROJECT / "tests"))

pytestmark = [pytest.mark.rdma, pytest.mark.full]

RDMA_MIGRATE = Path(sys.executable).with_name("rdma-migrate")
MIB = 1 << 20


def test_the_example_is_a_source(tmp_path):
    from harness import device_address

    _, host = device_address()
    text = (kit.PROJECT / "docs" / "plugin.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    script = tmp_path / "engine.py"
    script.write_text(example)
    vm = tmp_path / "vm"
    with subprocess.Popen(
        [RDMA_MIGRATE, "incoming", f"rdma:{host}:0", "--output", vm, "--accept-timeout", "120"],
        stdout=subprocess.PIPE,
        text=True,
    ) as incoming:
        try:
            uri = incoming.stdout.readline().removeprefix("listening on ").strip()
            source = kit.check([sys.executable, script, uri])
            assert incoming.wait(180) == 0
        finally:
            incoming.kill()
    assert "destination: everything is on disk" in source

    shown = kit.check([RDMA_MIGRATE, "inspect", vm, "--verify", "--json"])
    report = json.loads(shown)
    assert report["machine"] == "toy-1.0"
    # Page 4 was sent twice: with data, then as zeros.
    assert report["ram"]["data_bytes"] == MIB - 4096
    wanted = bytearray(b"toy\n" * (MIB // 4)) + bytes(7 * MIB)
    wanted[3 * 4096 : 5 * 4096] = b"later" + bytes(2 * 4096 - 5)
    assert (vm / "ram" / "0.raw").read_bytes() == wanted
