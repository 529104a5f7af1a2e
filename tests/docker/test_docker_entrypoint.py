# SPDX-License-Identifier: Apache-2.0
"""What the entry point says of a wrong set-up, where that can be had without a container.

A namespace of the kernel's is what a container is made of: mounts, networks and limits here are as
real as there. `make docker-test` does the same with containers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import docker_kit as kit
import pytest
from harness import device_address

ENTRYPOINT = kit.PROJECT / "docker" / "entrypoint"
SETUP_RXE = kit.PROJECT / "docker" / "setup-rxe"


def entrypoint(
    *arguments: str, prefix: str = "", device: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it, behind lines of shell that prepare a mount namespace of its own."""
    environment = {name: v for name, v in os.environ.items() if name != "RDMA_MIG_DEVICE"}
    if device:
        environment["RDMA_MIG_DEVICE"] = device
    command = [sys.executable, str(ENTRYPOINT), *arguments]
    if prefix:
        unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
        command = [*unshare, "sh", "-ec", f'{prefix}\nexec "$@"', "sh", *command]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment
    )


def says(result: subprocess.CompletedProcess[str], begin: str, remedy: str) -> None:
    assert result.returncode == 3, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"rdma-mig: {begin}")
    assert remedy in line


NO_FILES = "mount -t tmpfs none /dev"


@pytest.mark.parametrize(
    "command",
    [
        ["check"],
        ["source"],
        ["destination"],
        ["tests"],
        ["rdma-migrate", "incoming", "rdma:192.0.2.1:4444", "--output", "vm"],
        ["qemu-system-x86_64", "-incoming", "rdma:192.0.2.1:4444"],
    ],
    ids=lambda command: command[0],
)
def test_no_device_files(command):
    result = entrypoint(*command, prefix=NO_FILES)
    says(result, "this container has no /dev/infiniband; ", "--device /dev/infiniband")


def test_no_device():
    hide = "[ ! -d /sys/class/infiniband ] || mount -t tmpfs none /sys/class/infiniband"
    result = entrypoint("check", prefix=f"{NO_FILES}\nmkdir /dev/infiniband\n{hide}")
    says(result, "the host has no RDMA device; ", "docker/setup-rxe")


def test_what_needs_no_device_is_run():
    result = entrypoint("echo", "incoming", prefix=NO_FILES)
    assert (result.returncode, result.stdout) == (0, "incoming\n")
    assert entrypoint("sh", "-c", "exit 7").returncode == 7


def test_command_that_is_not_there():
    result = entrypoint("no-such-command")
    assert result.returncode == 127
    assert result.stderr == "rdma-mig: no-such-command: No such file or directory\n"


def test_no_command():
    result = entrypoint()
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


# ---- with a device ----


@pytest.mark.rdma
def test_set_up_that_is_right():
    device, address = device_address()
    result = entrypoint("check", device=device)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"ready: device {device}, addresses {address}")


@pytest.mark.rdma
@pytest.mark.root
def test_wrong_set_ups_with_a_device():
    """In one test, since each of its starts costs seconds where the processor is emulated."""
    device, address = device_address()
    says(entrypoint("check", device="nope"), "there is no RDMA device nope; ", device)

    low = 'ulimit -l 64; set -- setpriv --bounding-set -ipc_lock "$@"'
    result = entrypoint("check", device=device, prefix=low)
    says(result, "this container may lock 64 KiB of memory", "--ulimit memlock=-1")

    other_network = 'set -- unshare --net "$@"'
    result = entrypoint("check", device=device, prefix=other_network)
    says(
        result, f"this container has a network of its own, where device {device} ({address}",
        "--network host",
    )  # fmt: skip

    hidden = "mount -t tmpfs none /dev/infiniband"
    says(entrypoint("check", device=device, prefix=hidden), "this container has no /dev/infi",
         "--device /dev/infiniband")  # fmt: skip

    files = [*Path("/dev/infiniband").glob("uverbs*"), Path("/dev/infiniband/rdma_cm")]
    modes = [path.stat().st_mode & 0o777 for path in files]
    somebody = 'set -- setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    try:
        for path in files:
            path.chmod(0o600)
        result = entrypoint("check", device=device, prefix=somebody)
    finally:
        for path, mode in zip(files, modes, strict=True):
            path.chmod(mode)
    says(result, "/dev/infiniband/uverbs", "--user 0")


@pytest.mark.rdma
@pytest.mark.root
def test_device_is_made_used_and_removed_and_no_other_touched():
    def state() -> list[str]:
        links = kit.quiet("rdma", "link", "show").splitlines()
        interfaces = kit.quiet("ip", "-br", "addr", "show").splitlines()
        return sorted(line for line in links + interfaces if "rxe-mig" not in line)

    def setup(*arguments: str) -> str:
        return kit.quiet(str(SETUP_RXE), *arguments)

    before = state()
    try:
        ready = setup("--address", "192.0.2.77")
        assert ready.startswith("setup-rxe: rxe_mig is ready on 192.0.2.77 (")
        assert setup("--address", "192.0.2.77") == ready
        assert state() == before
        result = entrypoint("check", device="rxe_mig")
        assert result.stdout == "ready: device rxe_mig, addresses 192.0.2.77, fd52:4d49:4700::1\n"
        if len(before) > 1:
            says(entrypoint("check"), "there are ", "RDMA_MIG_DEVICE=")
        assert "rxe_mig" in entrypoint("check", "rdma:192.0.2.77:1").stdout
    finally:
        setup("--undo")
    assert state() == before
    assert setup("--undo") == "setup-rxe: rxe_mig and rxe-mig0 are gone"
    assert "rxe_mig" not in kit.quiet("rdma", "link", "show")
