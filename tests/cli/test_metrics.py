# SPDX-License-Identifier: Apache-2.0
"""``--metrics-file`` and ``--metrics-port`` without RDMA; with it in tests/rdma."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "snapshot"))

import snapshot_kit
from harness.metrics import Metrics
from test_cli_usage import COMMAND, one_line, run

from rdma_mig.memory import RamBlock


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    blocks = [RamBlock("pc.ram", 1 << 20)]
    with snapshot_kit.guest(blocks) as memories:
        with memories[0].view() as view:
            view[:8192] = bytes([7]) * 8192
        yield snapshot_kit.keep(tmp_path / "kept", memories, blocks)


def test_file_is_what_was_done(kept: Path, tmp_path: Path):
    metrics = tmp_path / "vm.prom"
    stream = tmp_path / "stream"
    result = run("outgoing", kept, f"file:{stream}", "--metrics-file", metrics)
    assert result.returncode == 0, result.stderr
    told = Metrics(metrics.read_text())
    assert told.value("pages_total", kind="normal") == 2
    assert told.value("pages_total", kind="duplicate") == 254
    assert told.value("transferred_bytes_total", role="outgoing", vm="kept") == 8192
    assert told.value("rounds_total") == 1
    assert told.value("status", status="completed") == 1
    assert told.value("status", status="active") == 0
    assert sum(told.value("errors_total", **label) for label in told.labels("errors_total")) == 0
    assert told.value("info", transport="file", device="") == 1
    assert told.labels("port_counter_total") == []
    # Written beside it, then renamed; and nobody's own clock is among the figures.
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "stream", "vm.prom"}
    assert "_created" not in told.text


def test_failure_is_counted_by_its_kind(kept: Path, tmp_path: Path):
    metrics = tmp_path / "vm.prom"
    result = run("outgoing", kept, f"unix:{tmp_path / 'none'}", "--metrics-file", metrics)
    one_line(result, 1)
    told = Metrics(metrics.read_text())
    assert told.value("errors_total", kind="PeerGone") == 1
    assert told.value("errors_total", kind="MigrationTimeout") == 0
    assert told.value("status", status="failed") == 1


def test_port_is_served_on_loopback_while_it_runs(tmp_path: Path):
    process = subprocess.Popen(
        [COMMAND, "incoming", f"unix:{tmp_path / 'socket'}", "-o", tmp_path / "vm",
         "--metrics-port", "0"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        assert line.startswith("metrics at http://127.0.0.1:"), line
        assert process.stdout.readline().startswith("listening on ")
        url = line.split()[-1]
        with urllib.request.urlopen(url, timeout=10) as answer:
            told = Metrics(answer.read().decode())
        assert told.value("status", status="setup", role="incoming", vm="vm") == 1
        assert told.value("transferred_bytes_total") == 0
    finally:
        process.terminate()
        _out, error = process.communicate(timeout=30)
    assert process.returncode == 5, error


def test_port_that_is_taken(kept: Path, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        line = one_line(run("outgoing", kept, f"file:{tmp_path / 's'}", "--metrics-port", where), 3)
    assert f"metrics cannot be served at {where}: Address already in use" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("where", ["x", "1.2.3.4:", "::1:80", "70000", "-1", ":80", ""])
def test_what_is_no_address(kept: Path, tmp_path: Path, where: str):
    stream = f"file:{tmp_path / 's'}"
    assert "is no [ADDRESS:]PORT" in one_line(
        run("outgoing", kept, stream, f"--metrics-port={where}"), 2
    )


def test_file_that_cannot_be_written(kept: Path, tmp_path: Path):
    metrics = tmp_path / "none" / "vm.prom"
    line = one_line(run("outgoing", kept, f"file:{tmp_path / 's'}", "--metrics-file", metrics), 2)
    assert f"the metrics cannot be written to {metrics}: No such file" in line
    assert not (tmp_path / "s").exists()


def test_library_that_is_missing(kept: Path, tmp_path: Path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "prometheus_client.py").write_text("raise ImportError\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'hidden')!r})\n"
        "from rdma_mig.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "outgoing", kept, f"file:{tmp_path / 's'}",
         "--metrics-file", tmp_path / "vm.prom"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    line = one_line(result, 3)
    assert "prometheus_client, the extra 'metrics'" in line
    assert "pip install 'prometheus_client>=0.16'" in line
