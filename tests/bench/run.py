#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure migrations between real QEMUs and rdma-migrate, alternated, over one device.

Every size, content and mode is a cell; in each, all contenders and the floor take turns, round by
round, after a warm-up that touches all memory and compares every byte that arrives. Runs where
there is a verbs device (`make bench` boots a machine that has one).
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import disk  # noqa: E402
import empty_migration  # noqa: E402
import figures  # noqa: E402
import live  # noqa: E402
import per_page  # noqa: E402
from chart import draw  # noqa: E402
from contenders import (  # noqa: E402
    ASSUMING,
    CONTENDERS,
    CONTENTS,
    MODES,
    REFERENCE,
    Measured,
    Stage,
)
from floor import Floor, FloorRound  # noqa: E402
from harness import device_address, qemu_binary  # noqa: E402

from rdma_mig.cli import entry  # noqa: E402

MIB = 1 << 20
_UNITS = {"M": MIB, "G": 1 << 30}
_CONTENDERS = (*CONTENDERS, ASSUMING)


def size(text: str) -> int:
    """Read a size such as 256M or 1G."""
    found = re.fullmatch(r"(\d+)([MG])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256M or 1G")
    return int(found[1]) * _UNITS[found[2]]


def pair(text: str) -> tuple[str, str]:
    """Read a contender such as ours-qemu."""
    source, _, destination = text.rpartition("-")
    if (source, destination) not in _CONTENDERS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join('-'.join(c) for c in _CONTENDERS)}"
        )
    return source, destination


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--ram", nargs="+", type=size, default=[256 * MIB, 1024 * MIB, 2048 * MIB], metavar="SIZE",
        help="RAM of the guest (default: 256M 1G 2G)")  # fmt: skip
    add("--content", nargs="+", choices=CONTENTS, default=["idle", "random", "half"])
    add("--mode", nargs="+", choices=MODES, default=["pin-all", "dynamic"])
    add("--contenders", nargs="+", type=pair, default=list(_CONTENDERS), metavar="FROM-TO",
        help="such as ours-qemu; qemu-qemu, the reference, always runs; ours-assuming-qemu, with "
        "--assume-zero-destination, in dynamic mode of an idle guest only")  # fmt: skip
    add("--rounds", type=int, default=9, help="in each cell (default %(default)s)")
    add("--dir", type=Path, help="where snapshots go (default: a temporary directory)")
    add(
        "--disk-image",
        action="store_true",
        help="put an ext4 on a loop device there, in memory: where --dir is none on a disk; root",
    )
    add("--out", type=Path, default=Path("test-logs/bench"),
        help="directory for bench.json, bench.md and bench.png (default %(default)s)")  # fmt: skip
    add("--no-live", action="store_true", help="leave the downtime of live sources out")
    add("--timeout", type=float, default=300, help="of one migration, seconds")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    options.contenders = [c for c in _CONTENDERS if c == REFERENCE or c in options.contenders]
    return options


def about(arguments: list[str]) -> dict[str, Any]:
    """Return where and with what this runs."""
    device, address = device_address()
    active = Path(f"/sys/class/infiniband/{device}/ports/1")
    version = subprocess.run(
        [qemu_binary(), "--version"], capture_output=True, text=True, check=True
    )
    return {
        "command": shlex.join(["make", "bench", f"BENCH_ARGS={' '.join(arguments)}"]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "device": device,
        "link": (active / "link_layer").read_text().strip(),
        "address": address,
        "mtu": None,
        "filesystem": None,
        "qemu": version.stdout.splitlines()[0],
        "python": platform.python_version(),
    }


def compile_modules() -> None:
    """Keep the bytecode of our modules, as an installation does and an editable one does not.

    Else each process begins with compiling them, which no user's does.
    """
    compileall.compile_dir(Path(entry.__file__).parents[1], quiet=1)


def touch_all_memory() -> None:
    """Use what memory is free, once: where memory is a guest's, the first touch is slow."""
    left = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert left is not None
    step = bytes(16 * MIB)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        room = os.statvfs("/dev/shm")
        most = min((int(left[1]) << 10) - 512 * MIB, room.f_bavail * room.f_frsize - 64 * MIB)
        for _ in range(0, max(most, 0), len(step)):
            file.write(step)


def measure_cell(
    stage: Stage, mode: str, options: argparse.Namespace, floor: Floor
) -> list[dict[str, Any]]:
    """Run one cell; return its rows."""
    zeros = (stage.content, mode) == ("idle", "dynamic")
    contenders = [c for c in options.contenders if c != ASSUMING or zeros]
    rounds: dict[tuple[str, str], list[Measured]] = {c: [] for c in contenders}
    floors: list[FloorRound] = []
    copies: list[float] = []
    for number in range(-1, options.rounds):
        # Each round begins with another one: nobody always comes after the same.
        turn = max(number, 0) % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            measured = stage.run(*contender, mode, check=number < 0)
            if number >= 0:
                rounds[contender].append(measured)
            else:
                say(f"warm-up: {'-'.join(contender)} {measured.total:.3f}, every byte equal")
        fastest, copied = floor.measure(stage.ram), stage.copy_to_disk()
        if number >= 0:
            floors.append(fastest)
            copies.append(copied)
            say(
                f"round {number + 1}: "
                + ", ".join(f"{'-'.join(c)} {rounds[c][-1].total:.3f}" for c in rounds)
                + f"; floor {fastest.setup:.3f} + {fastest.writes:.3f}"
            )
    cell = {"ram": stage.ram, "content": stage.content, "mode": mode, "data": stage.data}
    return [
        figures.row(cell, contender, rounds[contender], rounds[REFERENCE], floors, copies)
        for contender in contenders
    ]


def say(text: str) -> None:
    print(text, flush=True)


def write(
    out: Path, what: dict[str, Any], rows: list[dict[str, Any]], others: list[dict[str, Any]]
) -> None:
    """Write what there is up to now: a run that is cut off has not been in vain."""
    out.mkdir(parents=True, exist_ok=True)
    report = {"about": what, "rows": rows, "others": others}
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    head = "\n".join(f"- {name}: {value}" for name, value in what.items())
    tables = f"{figures.table(rows)}\n\n{per_page.table(others)}"
    (out / "bench.md").write_text(f"{head}\n\n{tables}\n")
    draw(rows, what, out / "bench.png")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    what = about(arguments)
    compile_modules()
    touch_all_memory()
    rows: list[dict[str, Any]] = []
    others = [*per_page.measure(), empty_migration.measure(what["address"], options.rounds)]
    say(per_page.table(others))
    with (
        tempfile.TemporaryDirectory(prefix="rdma-mig-bench-", dir=options.dir) as directory,
        disk.on_image(Path(directory), disk.image_size(max(options.ram)))
        if options.disk_image
        else contextlib.nullcontext(),
        Floor(what["address"]) as floor,
    ):
        what["mtu"] = floor.mtu
        what["filesystem"] = disk.filesystem(Path(directory))
        if options.disk_image:
            what["filesystem"] += " on a loop device whose image is in memory"
        for name, value in what.items():
            say(f"{name}: {value}")
        for ram in options.ram:
            for content in options.content:
                with Stage(ram, content, Path(directory) / "stage", options.timeout).set() as stage:
                    for mode in options.mode:
                        say(f"{ram // MIB} MiB, {content}, {mode}")
                        rows += measure_cell(stage, mode, options, floor)
                        write(options.out, what, rows, others)
        others += figures.growth(rows)
        write(options.out, what, rows, others)
        if not options.no_live:
            # Last: a guest that does not converge ends the run.
            others += live.measure(floor, options.mode, options.rounds, say)
            write(options.out, what, rows, others)
    say(f"{figures.table(rows)}\n\n{per_page.table(others)}")
    targets = [*others, *(target for row in rows for target in row["targets"])]
    missed = [target for target in targets if not target["met"]]
    say(f"{len(missed)} targets missed; written: {options.out}/bench.json, bench.md, bench.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
