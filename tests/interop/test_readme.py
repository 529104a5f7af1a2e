# SPDX-License-Identifier: Apache-2.0
"""The commands that README shows for two hosts, as they stand there, on a device of this one.

Addresses, directories, the size of the guest and the names of devices are examples there; they are
replaced by what this host has, and nothing else is.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from harness import device_address, free_port
from harness.qemu import qemu_binary
from support import patience, wait_for

pytestmark = [pytest.mark.rdma, pytest.mark.qemu, pytest.mark.deadline(300)]

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
QEMU = "qemu-system-x86_64 -machine pc-q35-7.2 -m 4G -monitor stdio"


def blocks(title: str, language: str = "sh") -> list[str]:
    """The code blocks of a section."""
    [text] = re.findall(rf"^## {re.escape(title)}\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


class Host:
    """What the examples of README are on this host."""

    def __init__(self, room: Path) -> None:
        self.device, self.address = device_address()
        self.room = room
        self.port = free_port()

    def here(self, text: str) -> str:
        """A text of README with what this host has."""
        for example, real in {
            "192.0.2.1": self.address, "192.0.2.2": self.address, ":4444": f":{self.port}",
            "/var/lib/vm": str(self.room / "vm"), "/var/tmp": str(self.room),
            "mlx5_1": self.device, "--gid-index 3": f"--gid-index {self._gid_index()}",
            "16G": "64M", "-m 4G": "-m 64M",
        }.items():  # fmt: skip
            text = text.replace(example, real)
        return text

    def _gid_index(self) -> int:
        ports = Path("/sys/class/infiniband", self.device, "ports/1")
        mapped = "0000:0000:0000:0000:0000:ffff:" + ":".join(
            "{:02x}{:02x}".format(*pair)
            for pair in zip(*[iter(map(int, self.address.split(".")))] * 2, strict=True)
        )
        return next(
            int(path.name)
            for path in sorted(ports.glob("gids/*"))
            if path.read_text().strip() == mapped
            and "v2" in (ports / "gid_attrs/types" / path.name).read_text()
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


class Shell:
    """Commands that a shell runs; a context manager that ends them."""

    def __init__(self, text: str) -> None:
        places = f"{Path(sys.executable).parent}:{Path(qemu_binary()).parent}"
        self.text = text
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on leaving
        # The last command takes the place of the shell, so that a signal reaches it.
        *before, last = text.replace("\\\n", " ").splitlines()
        self.process = subprocess.Popen(
            ["bash", "-ec", "\n".join([f'PATH="{places}:$PATH"', *before, f"exec {last}"])],
            stdin=subprocess.PIPE, stdout=self._said, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            error.add_note(f"$ {self.text}\n{self.said()}")
        self.process.kill()
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self._said.close()

    def said(self) -> str:
        """What they have printed so far."""
        self._said.seek(0)
        return self._said.read()

    def wait_said(self, what: str) -> None:
        """Wait until this has been printed."""
        wait_for(repr(what), lambda: what in self.said(), patience(60))

    def ends(self) -> str:
        """Wait until they have ended well; return what was printed."""
        assert self.process.wait(patience(90)) == 0
        said = self.said()
        assert "Traceback" not in said
        return said

    def type(self, line: str) -> None:
        """Write a line to the last one's standard input."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


class Monitor:
    """A QEMU, and the monitor at its standard input: for people (HMP), or QMP."""

    def __init__(self, command: str, *, qmp: bool = False) -> None:
        self._qmp = qmp
        if qmp:
            command = command.replace("-monitor stdio", "-qmp stdio")
        self.shell = Shell(f"{command} -display none -accel tcg")
        self.shell.wait_said('"QMP"' if qmp else "(qemu)")
        if qmp:
            self.ask('{"execute": "qmp_capabilities"}')

    def ask(self, line: str) -> str:
        """Give it a line, and return what it answers."""
        before = len(self._answers())
        self.shell.type(line)
        answers = wait_for(
            f"an answer to {line}",
            lambda: found if len(found := self._answers()) > before else None,
            patience(60),
        )
        assert not self._qmp or "return" in json.loads(answers[-1])
        return answers[-1]

    def _answers(self) -> list[str]:
        said = self.shell.said()
        if not self._qmp:
            return said.split("(qemu)")[1:-1]
        lines: list[dict[str, Any]] = [
            json.loads(line) for line in said.splitlines() if line.startswith("{")
        ]
        return [json.dumps(each) for each in lines if {"return", "error"} & each.keys()]

    def wait_state(self, name: str) -> None:
        """Wait for a run state of the guest, or for a state of the migration."""
        question = '{"execute": "query-status"}' if self._qmp else "info status"

        def reached() -> bool:
            if name in self.ask(question):
                return True
            time.sleep(0.1)
            return False

        wait_for(name, reached, patience(60))


@contextmanager
def monitor(command: str, *, qmp: bool = False) -> Iterator[Monitor]:
    """A QEMU that is ended at the end."""
    qemu = Monitor(command, qmp=qmp)
    with qemu.shell:
        yield qemu


def test_check_the_hosts_first(host: Host):
    one, peer = map(host.here, blocks("Check the hosts first"))
    with Shell(one) as here:
        assert "device" in here.ends()
    with Shell("rdma-migrate doctor --serve") as serving:
        serving.wait_said("18515")
        with Shell(peer) as asking:
            assert "16 MiB" in asking.ends()
        assert "16 MiB" in serving.ends()


def test_how_fast_will_it_be(host: Host):
    [both] = blocks("How fast will it be")
    serve, ask = host.here(both).splitlines()
    with Shell(serve) as serving:
        serving.wait_said("18515")
        with Shell(ask) as asking:
            said = asking.ends()
            assert "RDMA" in said
            assert "converge" in said
        serving.ends()


@pytest.mark.parametrize("language", ["HMP", "QMP"])
def test_out_of_a_qemu_looked_at_and_into_a_qemu_again(host: Host, language: str):
    out = "Migrate a guest out of QEMU"
    qmp = language == "QMP"
    with (
        monitor(host.here(QEMU), qmp=qmp) as source,
        Shell(host.here(blocks(out)[0])) as incoming,
    ):
        incoming.wait_said(f"listening on rdma:{host.address}:{host.port}")
        for line in host.here(blocks(out, "")[1 if qmp else 0]).splitlines():
            source.ask(line)
        source.wait_state("postmigrate")
        assert "received from" in incoming.ends()

    look, verify = host.here(blocks("Look at a snapshot")[0]).splitlines()
    with Shell(look) as shown:
        assert "pc-q35-7.2" in shown.ends()
    with Shell(verify) as shown:
        assert json.loads(shown.ends())["verified"] is True

    waiting, send = map(host.here, blocks("Migrate it into a QEMU again"))
    with monitor(waiting) as destination:
        with Shell(send) as outgoing:
            assert "sent to" in outgoing.ends()
        destination.wait_state("running")

    # From one rdma-migrate to another, by devices' names; and what their traces tell.
    receive, forward = host.here(
        blocks("Addresses, and hosts with several devices")[0]
    ).splitlines()
    receive = receive.replace("/vm/", "/other-host/")
    (host.room / "other-host").mkdir()
    with Shell(f"{receive} --trace {host.room}/in.trace") as incoming:
        incoming.wait_said("listening on")
        with Shell(f"{forward} --trace {host.room}/out.trace") as outgoing:
            assert host.device in outgoing.ends()
        incoming.ends()
    show, check, chart = host.here(blocks("Trace")[0]).splitlines()
    for command in (show, check, chart):
        with Shell(command) as shown:
            shown.ends()
    assert "<svg" in (host.room / "migration.svg").read_text()


def test_ctrl_c_ends_what_waits(host: Host):
    with Shell(host.here(blocks("Migrate a guest out of QEMU")[0])) as incoming:
        incoming.wait_said("listening on")
        incoming.process.send_signal(signal.SIGINT)
        assert incoming.process.wait(patience(10)) == 5
    assert list((host.room / "vm").iterdir()) == []
