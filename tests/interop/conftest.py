# SPDX-License-Identifier: Apache-2.0
"""Makes ``import harness`` work however pytest was started; deadlines, and nothing left behind."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "manager"))

import support
from harness import Guest, Qemu, fill_random

_DEADLINE = 180.0  # seconds, unless the test is marked with another


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"deadline(seconds): the test is ended after so long ({_DEADLINE:g} by default)"
    )


class DeadlineExceeded(BaseException):
    """A test took too long. No Exception, so that nothing under test takes it for its own."""


@pytest.fixture(autouse=True)
def _deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """End a test that hangs, so that its `finally` parts still run and what they know is shown."""
    marker = request.node.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else _DEADLINE
    if request.node.get_closest_marker("rdma"):
        seconds = support.patience(seconds)

    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        raise DeadlineExceeded(f"not through after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test with a device that leaves a process, a file in /dev/shm or a verbs object."""
    if not request.node.get_closest_marker("rdma"):
        yield
        return
    before = support.traces()
    yield
    # The kernel takes a moment to give back what a killed process had.
    end = time.monotonic() + support.patience(5)
    while left := support.traces().beyond(before):
        if time.monotonic() > end:
            pytest.fail("left behind: " + "; ".join(left), pytrace=False)
        time.sleep(0.05)


#: Start and length, bytes, of what is random in the RAM of guests that run.
RANDOM = (24 * support.MIB, 36 * support.MIB)


def prepare(qemu: Qemu) -> None:
    """Make a QEMU ready for migration, its guest running and with data that is not zero."""
    qemu.set_capability("rdma-pin-all")
    qemu.wait_heartbeat(2)
    # Only now: the firmware works all over RAM until it has started the guest.
    fill_random(qemu.memory_path, 1, *RANDOM)


class SharedQemu:
    """A running QEMU that one test after the other uses, started when it is first needed.

    Sharing it is more than thrift: each failed migration is followed by others from the same QEMU,
    whose guest has to have survived it.
    """

    guest = Guest.dirtying(4)

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._qemu: Qemu | None = None

    def get(self) -> Qemu:
        """The QEMU, its guest running; another one when the last was lost or does not run."""
        if self._qemu is not None and not self._usable(self._qemu):
            self.close()
        if self._qemu is None:
            self._qemu = Qemu(
                guest=self.guest, name="source", timeout=support.patience(60), **self._options
            )
            support.SHARED.append(self._qemu)
            try:
                prepare(self._qemu)
            except BaseException:
                self.close()
                raise
        self._qemu.set_parameter("max-bandwidth", 0)
        return self._qemu

    @staticmethod
    def _usable(qemu: Qemu) -> bool:
        try:
            return qemu.status() == "running"
        except Exception:  # it is gone, or answers no more: whatever it says, it is replaced
            return False

    def close(self) -> None:
        """End it."""
        if self._qemu is not None:
            support.SHARED.remove(self._qemu)
            self._qemu.close()
            self._qemu = None


@pytest.fixture(scope="session")
def _shared_source() -> Iterator[SharedQemu]:
    shared = SharedQemu(machine="q35")
    yield shared
    shared.close()


@pytest.fixture
def source(_shared_source: SharedQemu) -> Qemu:
    """A QEMU with pin-all whose guest runs, dirties memory, and has 36 MiB of random data."""
    return _shared_source.get()


def take_snapshot(directory: Path, machine: str, devices: list[dict[str, str]]) -> support.Snapshot:
    """Keep a running guest whose machine has these devices more than usual."""
    options = {"machine": machine, "guest": Guest.dirtying(4), "timeout": support.patience(60)}
    with support.Incoming(directory) as incoming, Qemu(**options, name="source") as qemu:
        for device in devices:
            # Plugged in when all others are there, or its state would come before globalstate's.
            qemu.qmp("device_add", None, **device)
        prepare(qemu)
        qemu.migrate(incoming.uri)
        qemu.wait_migration()
        completed = incoming.succeed().event("completed")
    last = [f"{device['driver']},addr={device['addr']}" for device in devices]
    return support.Snapshot(directory, completed, options, last)


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> support.Snapshot:
    """A running guest whose device state fits into one message and has nothing behind its end."""
    return take_snapshot(
        tmp_path_factory.mktemp("snapshot") / "kept",
        "pc,suppress-vmdesc=on",
        [{"driver": "pci-serial", "addr": "0x6"}],
    )


@pytest.fixture(scope="session")
def long_snapshot(tmp_path_factory: pytest.TempPathFactory) -> support.Snapshot:
    """A running guest whose device state takes several messages, and its description more."""
    return take_snapshot(
        tmp_path_factory.mktemp("long-snapshot") / "kept",
        "pc",
        # The first takes 45 KiB.
        [{"driver": "virtio-rng-pci", "addr": "0x5"}, {"driver": "pci-serial", "addr": "0x6"}],
    )
