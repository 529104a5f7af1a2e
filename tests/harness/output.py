# SPDX-License-Identifier: Apache-2.0
"""What commands print with ``--json``, held against the schema that the package has for it."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator

# Of the package that is tried, which may be an installed one, far from these tests. Read at once:
# once tests run, an editable install has nothing more to import.
_SCHEMA = resources.files("rdma_mig.cli").joinpath("output.schema.json").read_text("utf-8")


@functools.cache
def schema() -> dict[str, Any]:
    """The schema, as it is in the package."""
    found: dict[str, Any] = json.loads(_SCHEMA)
    Draft202012Validator.check_schema(found)
    return found


def _closed(node: Any) -> Any:
    """The same schema, which takes no key that it does not name: what is printed is documented."""
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        closed["additionalProperties"] = False
    return closed


@functools.cache
def _validator(name: str) -> Draft202012Validator:
    closed = _closed(schema())
    return Draft202012Validator({**closed, "$ref": f"#/$defs/{name}"})


def check_output(name: str, value: Any) -> Any:
    """Return the value; it must be what the definition of this name says, and no more.

    An event is held against the definition of its own name, whose errors say which key is wrong.
    """
    if name == "event":
        assert value.get("event") in schema()["$defs"], value
        name = value["event"]
    errors = [
        f"{error.json_path}: {error.message}" for error in _validator(name).iter_errors(value)
    ]
    assert errors == [], f"{name}: {errors}"
    return value
