# SPDX-License-Identifier: Apache-2.0
"""Progress: one line that is kept up on a terminal, else lines; and what stands in them."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "snapshot"))

import snapshot_kit
from test_cli_usage import COMMAND

from rdma_mig.cli.progress import words_of
from rdma_mig.memory import RamBlock
from rdma_mig.metrics import meter as meters
from rdma_mig.metrics.meter import Meter, Standing
from rdma_mig.migration.events import Connected, Progress
from rdma_mig.migration.state import Migration

MIB = 1 << 20
# Takes the stream after a while, so that there is something to see.
SLOW = "exec:sleep 1.5; cat > /dev/null"


@pytest.fixture
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    blocks = [RamBlock("pc.ram", 4 * MIB), RamBlock("vga.vram", MIB)]
    with snapshot_kit.guest(blocks) as memories:
        for memory in memories:
            with memory.view() as view:
                view[:] = bytes([7]) * len(view)
        yield snapshot_kit.keep(tmp_path_factory.mktemp("progress") / "kept", memories, blocks)


def on_terminal(
    *arguments: str | Path, terminal: bool = True, status: int = 0, **environment: str
) -> str:
    """Run it with a terminal for standard error, and return what the terminal got."""
    if terminal:
        master, slave = pty.openpty()
    else:
        master, slave = os.pipe()
    told = b""
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **environment},
    )  # fmt: skip
    os.close(slave)
    end = time.monotonic() + 60
    try:
        while time.monotonic() < end and select.select([master], [], [], 60)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:  # EIO: nobody has the other end any more
                break
            if not data:
                break
            told += data
        assert process.wait(10) == status, told
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return told.decode()


def test_terminal_has_one_line_that_is_kept_up(kept: Path):
    told = on_terminal("outgoing", kept, SLOW)
    assert re.search(r"writing RAM to the destination: \d+ % of 5\.0 MiB", told), told
    # Written over, several times a second, and the cursor is there again in the end.
    assert told.count("\x1b[2K") > 4
    assert told.rindex("\x1b[?25h") > told.rindex("\x1b[?25l")


def test_no_terminal_has_lines(kept: Path):
    told = on_terminal("outgoing", kept, SLOW, terminal=False)
    assert "\x1b" not in told
    lines = told.splitlines()
    assert "preparing memory: 5.0 MiB" in lines
    assert any(line.startswith("writing RAM to the destination: ") for line in lines)


@pytest.mark.parametrize("why", ["dumb", "no-library"])
def test_terminal_that_can_do_nothing_has_lines(kept: Path, tmp_path: Path, why: str):
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = {"TERM": "dumb"} if why == "dumb" else {"PYTHONPATH": path}
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError\n")
    told = on_terminal("outgoing", kept, SLOW, **environment)
    assert "\x1b" not in told
    assert "preparing memory: 5.0 MiB" in told


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_who_wants_none_has_none(kept: Path, option: str):
    assert on_terminal("outgoing", kept, SLOW, option) == ""


def test_failure_ends_the_line(kept: Path):
    told = on_terminal("outgoing", kept, "exec:sleep 0.5; exit 3", status=1)
    assert "Traceback" not in told
    # The cursor is there again, and what failed has a line of its own.
    assert told.count("\x1b[?25l") == told.count("\x1b[?25h") == 1
    assert re.search(r"\n\x1b\[\?25hrdma-migrate: [^\r\n]*\r\n$", told), told


# ---- what is said ----


def test_words():
    assert words_of(Standing("setup", total=4 * MIB)) == "preparing memory: 4.0 MiB"
    assert words_of(Standing("round", round=3)) == "RAM round 3"
    everything = Standing(
        "transfer", done=MIB, total=4 * MIB, rate=2.0 * MIB, share=0.87, dirty_rate=5000.0,
        expected_downtime=0.03, left=75,
    )  # fmt: skip
    assert words_of(everything) == (
        "writing RAM to the destination: 25 % of 4.0 MiB, 2.0 MiB/s (87 % of the link), the guest "
        "dirties 4.9 KiB/s, expected downtime 30 ms, 1 min 15 s left"
    )


def test_meter_counts_between_events(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(meters.time, "monotonic", lambda: now)
    monkeypatch.setattr(meters, "link_rate", lambda device, port: 4e6)
    meter = Meter()
    with Migration() as migration:
        meter.migration = migration
        meter.event(
            Connected("10.0.0.2:1", "10.0.0.1:2", "rxe0", 1, "RoCE v2", 0, "::", 4096, True, 1)
        )
        meter.event(Progress("setup", 0, 8 * MIB))
        assert meter.look() == Standing("setup", total=8 * MIB)
        meter.event(Progress("transfer", 0, 8 * MIB))
        migration.state.counters.issued(MIB, zero=False)
        assert meter.look().rate is None
        now = 101.0
        migration.state.counters.issued(2 * MIB, zero=False)
        migration.state.counters.issued(MIB, zero=True)
        seen = meter.look()
        assert (seen.done, seen.total, seen.per_cent) == (4 * MIB, 8 * MIB, 50)
        assert seen.rate == 2 * MIB
        assert seen.share == 2 * MIB / 4e6
        # Zeros count as done: three of four are behind it, and it goes on like that.
        assert seen.left == pytest.approx(4 / 3)
        migration.state.dirty_bytes_rate = 12345
        migration.state.expected_downtime = 30
        assert (meter.look().dirty_rate, meter.look().expected_downtime) == (12345.0, 0.03)


def test_rate_of_a_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rdma_mig.metrics import ports

    folder = tmp_path / "mlx5_0" / "ports" / "1"
    for name, text in (
        ("rate", "100 Gb/sec (4X EDR)\n"),
        ("counters/port_rcv_data", "250\n"),
        ("counters/symbol_error", "N/A\n"),
        ("hw_counters/lifespan", "10\n"),
        ("hw_counters/out_of_sequence", "3\n"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(ports, "_CLASS", tmp_path)
    assert ports.link_rate("mlx5_0", 1) == 12.5e9
    assert ports.link_rate("mlx5_0", 2) is None
    assert ports.counters("mlx5_0", 1) == {"port_rcv_bytes": 1000, "out_of_sequence": 3}
