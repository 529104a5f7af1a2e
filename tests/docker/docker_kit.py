# SPDX-License-Identifier: Apache-2.0
"""What `make docker-test` is made of: the commands of docs/docker.md, a Docker engine, the lab.

Standard library only, since hosts that have Docker need not have the rest of the project.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENT = PROJECT / "docs" / "docker.md"
WORK = PROJECT / ".lab" / "docker"
ARCHIVE = WORK / "images.tar"
IMAGES = ("rdma-mig", "rdma-mig-tests")
#: The sections whose commands are of use only where something is not reached.
OFFLINE = ("Without a package index", "Without an image registry")
ENGINE_OPTIONS = ("--iptables=false", "--bridge=none")


class Failed(Exception):
    """Something was not as it should be. The first line says what."""


def say(text: str) -> None:
    print(text, flush=True)


def commands() -> dict[str, list[str]]:
    """The shell commands of docs/docker.md by section, in order."""
    found: dict[str, list[str]] = {}
    for title, text in re.findall(
        r"^## (.*?)\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL
    ):
        blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        lines = "".join(blocks).replace("\\\n", " ").splitlines()
        found[title] = [" ".join(line.split()) for line in lines if line.strip()]
    return found


def needs_registries(line: str) -> bool:
    """Whether a command is run where packages can be had: on this machine, not in the lab."""
    return " build" in line or line in [c for title in OFFLINE for c in commands()[title]]


def machine_commands() -> list[str]:
    """The commands that build the images."""
    return [
        line
        for title, lines in commands().items()
        for line in lines
        if title not in OFFLINE and needs_registries(line)
    ]


def device_commands() -> list[str]:
    """The commands that are run where the device is, in order, the ones that clean up last."""
    sections = commands()
    lines = [
        line
        for title, section in sections.items()
        for line in section
        if title not in OFFLINE and not needs_registries(line)
    ]
    last = [line for line in lines if line.endswith((" down", " --undo"))]
    return [line for line in lines if line not in last] + last


# ---- running things ----


def run(command: str | list[str], *, status: int | None = 0, seconds: float = 600) -> str:
    """Run a command and show it and what it prints; return that.

    Args:
        command: a line for the shell, or words.
        status: the exit status that it must have; None for any.
        seconds: limit.

    Raises:
        Failed: it had another exit status, or was not through in time.
    """
    shown = command if isinstance(command, str) else shlex.join(command)
    say(f"$ {shown}")
    begun = time.monotonic()
    words = ["bash", "-c", command] if isinstance(command, str) else command
    printed = []
    with subprocess.Popen(
        ["timeout", "--kill-after=20", f"{seconds:.0f}", *words],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout
        for line in process.stdout:
            print(f"    {line}", end="", flush=True)
            printed.append(line)
        got = process.wait()
    say(f"    ({time.monotonic() - begun:.1f} s)")
    if status is not None and got != status:
        raise Failed(f"{shown} ended with status {got}, not {status}")
    return "".join(printed)


def quiet(*words: str) -> str:
    """Run a command that must succeed, and return what it prints, without the last newline."""
    done = subprocess.run(
        words, cwd=PROJECT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"{shlex.join(words)} ended with status {done.returncode}: {done.stderr}")
    return done.stdout.rstrip("\n")


def works(*words: str) -> bool:
    """Whether a command is there and succeeds."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def check(true: object, wrong: str) -> None:
    """Raise Failed when something does not hold."""
    if not true:
        raise Failed(wrong)


# ---- the engine ----


@contextlib.contextmanager
def engine(directory: Path, *drivers: str, keep: bool = False) -> Iterator[None]:
    """A dockerd of our own while the block runs, with DOCKER_HOST set to it.

    Args:
        directory: where it keeps everything; removed at the end.
        drivers: storage drivers, of which the first that works is taken.
        keep: leave the directory, for the next one to find what was built.
    """
    for program, package in (("dockerd", "docker.io"), ("docker-compose", "docker-compose")):
        check(shutil.which(program), f"no {program} here: apt-get install {package}")
    check(os.geteuid() == 0, "no Docker engine runs here, and only root can start one")
    directory.mkdir(parents=True, exist_ok=True)
    # The name of a socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="rdma-mig-engine-") as run_directory:
        address = f"unix://{run_directory}/docker.sock"
        log = directory / "dockerd.log"
        process = None
        for driver in drivers:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [
                        "dockerd", f"--data-root={directory}/data", f"--exec-root={run_directory}",
                        f"--host={address}", f"--pidfile={run_directory}/dockerd.pid",
                        f"--storage-driver={driver}", *ENGINE_OPTIONS,
                    ],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                )  # fmt: skip
            end = time.monotonic() + 120
            while process.poll() is None and not works("docker", "-H", address, "info"):
                if time.monotonic() > end:
                    stop(process)
                time.sleep(0.2)
            if process.poll() is None:
                break
        else:
            raise Failed(f"dockerd does not start: {log.read_text()[-2000:]}")
        saved = os.environ.get("DOCKER_HOST")
        os.environ["DOCKER_HOST"] = address
        try:
            say(f"dockerd {quiet('docker', 'version', '-f', '{{.Server.Version}}')}, {driver}")
            yield
        finally:
            os.environ.pop("DOCKER_HOST")
            if saved is not None:
                os.environ["DOCKER_HOST"] = saved
            stop(process)
            # An engine leaves the network namespace of its containers mounted.
            unmount_below(Path(run_directory))
            if not keep:
                unmount_below(directory)
                shutil.rmtree(directory, ignore_errors=True)


def unmount_below(directory: Path) -> None:
    """Unmount what is mounted within a directory, so that it can be removed."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        mounted = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    for path in reversed(mounted):
        if path.startswith(f"{directory}/"):
            quiet("umount", "--lazy", path)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End dockerd, and with it its containers."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def composes() -> list[str]:
    """The compose commands that are here, as one types them: 1.29, version 2, or both."""
    found = []
    if shutil.which("docker-compose"):
        found.append("docker-compose")
    if works("docker", "compose", "version"):
        found.append("docker compose")
    check(found, "no compose here: apt-get install docker-compose")
    return found


def with_compose(line: str, compose: str) -> str:
    """A documented command with another compose."""
    return re.sub(r"^docker-compose ", f"{compose} ", line)


def inspect(what: str) -> dict[str, object]:
    """What the engine knows of an image or a container."""
    return dict(json.loads(quiet("docker", "inspect", what))[0])


def in_lab(command: list[str], seconds: float) -> int:
    """Run a command where there is a device: in the lab, or in the one that RDMA_MIG_LAB names."""
    logs = PROJECT / "test-logs"
    logs.mkdir(exist_ok=True)
    other = os.environ.get("RDMA_MIG_LAB")
    if other:
        lab = shlex.split(other)
    else:
        lab = [str(PROJECT / "tests" / "lab" / "run"), "--share", str(logs)]
        lab += ["--log", str(logs / "docker-console.log"), "--timeout", f"{seconds:.0f}"]
        lab += ["--memory", "6G", "--"]
    words = [*lab, sys.executable, *command]
    say(f"$ {shlex.join(words)}")
    return subprocess.run(words, cwd=PROJECT, stdin=subprocess.DEVNULL, check=False).returncode
