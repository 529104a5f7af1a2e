# SPDX-License-Identifier: Apache-2.0
"""The schema of what ``--json`` prints: events, document and schema name the same things.

What the commands really print is held against it where tests run them (harness.output).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.output import check_output, schema

from rdma_mig.cli.reporting import Reporter
from rdma_mig.errors import MigrationError
from rdma_mig.migration import events

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "events.md"


def kinds() -> list[type[events.MigrationEvent]]:
    # A dataclass with slots leaves the class that it was made of behind.
    return list({kind.event: kind for kind in events.MigrationEvent.__subclasses__()}.values())


@pytest.mark.parametrize("kind", kinds())
def test_each_event_has_its_definition(kind: type[events.MigrationEvent]):
    definition = schema()["$defs"][kind.event]
    names = ["event", *(field.name for field in dataclasses.fields(kind))]
    assert list(definition["properties"]) == definition["required"] == names


def test_an_event_is_one_of_those_defined():
    named = [each["$ref"].removeprefix("#/$defs/") for each in schema()["$defs"]["event"]["oneOf"]]
    assert sorted(named) == sorted([*(kind.event for kind in kinds()), "failed"])


def test_failure(capsys: pytest.CaptureFixture[str]):
    import json

    error = MigrationError("no", owner="nobody", remedy="none", step="testing")
    Reporter(as_json=True, quiet=False, verbose=False).failed(error)
    check_output("event", json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    "wrong",
    [
        {"event": "progress", "phase": "setup", "done": 0},
        {"event": "progress", "phase": "lunch", "done": 0, "total": 0},
        {"event": "progress", "phase": "setup", "done": -1, "total": 0},
        {"event": "progress", "phase": "setup", "done": 0, "total": 0, "secret": 1},
        {"event": "lunch"},
    ],
)
def test_what_is_not_documented_is_found(wrong: dict[str, Any]):
    with pytest.raises(AssertionError):
        check_output("event", wrong)


def test_document_names_each_definition_and_its_keys():
    text = DOCUMENT.read_text()
    for name, definition in schema()["$defs"].items():
        rows = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert len(rows) == 1, name
        keys = definition.get("items", definition).get("properties", {})
        documented = re.findall(r"`(\w+)`", rows[0].split("|")[2])
        assert documented == [key for key in keys if key != "event"], name
