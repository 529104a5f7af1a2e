# SPDX-License-Identifier: Apache-2.0
"""Real traces for the tests of ``rdma-migrate trace``, and how to change them.

The traces in `traces` were written over soft-RoCE: between two rdma-migrate (``ours-*``), by
incoming from a QEMU 7.2 and by outgoing to one (``qemu-*``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rdma_mig.cli.main import main

TRACES = Path(__file__).with_name("traces")
Records = list[dict[str, Any]]


def load(name: str) -> Records:
    return [json.loads(line) for line in (TRACES / name).read_text().splitlines()]


def store(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def find(records: Records, kind: str, nth: int = 0, **fields: Any) -> int:
    """Index of the nth record of a kind with these fields; counted from the end if negative."""
    found = [
        at
        for at, record in enumerate(records)
        if record["kind"] == kind and all(record[name] == value for name, value in fields.items())
    ]
    return found[nth]


def check(*paths: Path | str) -> int:
    return main(["trace", "check", *map(str, paths)])


def alter(records: Records, at: int, **fields: Any) -> int:
    """Let a record say something else; return where it is."""
    records[at] |= fields
    return at
