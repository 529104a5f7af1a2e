# SPDX-License-Identifier: Apache-2.0
"""The commands that README shows for QEMUs that are driven, run as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import free_port, qemu_binary
from support import Command, wait_for

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def shown() -> dict[str, list[str]]:
    """The commands of the section by their names, `restore --spawn` as "spawn"."""
    [section] = re.findall(r"^## Let rdma-migrate drive QEMU\n(.*?)^## ", README, re.M | re.S)
    lines = re.findall(r"^rdma-migrate (.*)$", section, re.M)
    words = [shlex.split(line) for line in lines]
    return {"spawn" if "--spawn" in each else each[0]: each for each in words}


@contextmanager
def web(directory: Path, name: str, *extra: str) -> Iterator[None]:
    """A QEMU like the one that README starts, with its QMP socket where README has it."""
    socket = directory / f"{name}.qmp"
    process = subprocess.Popen(
        [qemu_binary(), "-machine", "pc-q35-7.2", "-m", "64M", "-accel", "tcg", "-display", "none",
         "-qmp", f"unix:{socket},server=on,wait=off", *extra],
    )  # fmt: skip
    try:
        wait_for("its socket", socket.exists, 20)
        yield
    finally:
        process.kill()
        process.wait()
        socket.unlink()


def test_commands_of_the_readme(tmp_path: Path):
    replaced = {
        "/run/vm/": f"{tmp_path}/", "/var/lib/vm/": f"{tmp_path}/", "4G": "64M",
        "rdma:192.0.2.1:4444": f"tcp:127.0.0.1:{free_port()}",
    }  # fmt: skip
    commands = shown()
    assert {*commands} == {"checkpoint", "restore", "migrate", "spawn"}
    for words in commands.values():
        for at, word in enumerate(words):
            for old, new in replaced.items():
                word = word.replace(old, new)  # noqa: PLW2901
            words[at] = word

    def run(name: str, *more: str) -> str:
        with Command(*commands[name], *more) as command:
            return command.succeed().stderr

    with web(tmp_path, "web1"):
        run("checkpoint")
        with web(tmp_path, "web2", "-incoming", "defer"):
            assert "web2.qmp is running" in run("restore")
        with web(tmp_path, "web2", "-incoming", "defer"):
            assert "web2.qmp is running" in run("migrate")
    said = run("spawn", "-display", "none", "-accel", "tcg")
    found = re.search(r"the QEMU runs on: pid (\d+), .*messages in (\S+)/log", said)
    assert found
    subprocess.run(["kill", "-KILL", found[1]], check=True)
    subprocess.run(["rm", "-r", found[2]], check=True)
