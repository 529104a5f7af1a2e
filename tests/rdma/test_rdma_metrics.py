# SPDX-License-Identifier: Apache-2.0
"""Metrics of migrations over a device: the figures are those of the event `completed`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import rdma_command as command
import rdma_kit as kit
from harness.metrics import Metrics

pytestmark = pytest.mark.rdma


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def documented() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `rdma_migrate_(\w+)` \| (.*?) ?\|", DOCUMENT.read_text(), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


@pytest.mark.parametrize("pin_all", [True, False], ids=["pin-all", "dynamic"])
def test_figures_are_those_of_the_event(kept: Path, room: Path, pin_all: bool):
    mode = ["--rdma-pin-all"] if pin_all else []
    uri = f"rdma:{kit.device()[1]}:0"
    files = {name: room / f"{name}.prom" for name in ("in", "out")}
    traces = {name: room / name for name in files}
    options = {
        name: ["--metrics-file", str(files[name]), "--trace", str(traces[name])] for name in files
    }
    with command.incoming(uri, room / "vm", *options["in"]) as end:
        sent = command.run("outgoing", kept, end.uri, "--json", *options["out"], *mode)
        assert sent.returncode == 0, sent.stderr
        events = {"in": end.events(), "out": list(map(json.loads, sent.stdout.splitlines()))}
    for name, path in files.items():
        told = Metrics(path.read_text())
        done = command.event(events[name], "completed")
        assert told.value("transferred_bytes_total") == done["bytes"] > 0
        assert told.value("pages_total", kind="normal") == done["normal_pages"]
        assert told.value("pages_total", kind="duplicate") == done["duplicate_pages"]
        assert told.value("rounds_total") == done["rounds"] == 1
        assert told.value("writes_total") == done["writes"]
        assert told.value("written_bytes_total") == done["normal_pages"] * 4096
        for key in ("setup_seconds", "transfer_seconds", "writing_seconds"):
            assert told.value(key) == done[key]
        for key in ("device_state_bytes", "nonzero_bytes"):
            assert told.value(key) == done[key]
        assert told.value("status", status="completed") == 1
        assert told.value("info", device=kit.device()[0], pin_all=str(pin_all).lower()) == 1
        assert (name == "in") == (told.labels("downtime_seconds") != [])
        # The trace, which the same records made, has the rest.
        records = [json.loads(line) for line in traces[name].read_text().splitlines()]
        for kind, direction in (("out", "sent"), ("in", "received")):
            of = [record["type"] for record in records if record["kind"] == kind]
            assert of
            for each in set(of):
                counted = told.value("control_messages_total", direction=direction, type=each)
                assert counted == of.count(each)
        registered = [record for record in records if record["kind"] == "register"]
        assert told.value("registrations_total") == len(registered) > 0
        seconds = sum(record["seconds"] for record in registered)
        assert told.value("registration_seconds_total") == pytest.approx(seconds, abs=1e-9)
        assert told.value("registered_bytes") == 0
        names = {sample.removeprefix("rdma_migrate_") for sample in told.samples}
        assert names == set(documented()) - ({"downtime_seconds"} if name == "out" else set())
        for metric in names:
            assert all(
                label.keys() == documented()[metric] | {"role", "vm"}
                for label in told.labels(metric)
            )
        # What the kernel counts of the port.
        of_port = {label["counter"] for label in told.labels("port_counter_total")}
        folder = Path("/sys/class/infiniband", kit.device()[0], "ports/1/hw_counters")
        assert of_port >= {path.name for path in folder.iterdir()} - {"lifespan"}
