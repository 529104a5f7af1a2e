# SPDX-License-Identifier: Apache-2.0
"""Makes ``import harness`` and ``import rdma_kit`` work, and gives every test a deadline."""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

_TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_TESTS))
sys.path.insert(0, str(_TESTS / "rdma"))
sys.path.insert(0, str(_TESTS / "migration"))
sys.path.insert(0, str(_TESTS / "snapshot"))

import hooks_kit  # noqa: E402
import rdma_kit as kit  # noqa: E402
import snapshot_kit  # noqa: E402

from rdma_mig.memory.ram import GuestRam  # noqa: E402

_DEADLINE = 30.0  # seconds on a fast host, unless the test is marked with another


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"deadline(seconds): the test is ended after so long ({_DEADLINE:g} by default)"
    )


class DeadlineExceeded(BaseException):
    """A test took too long. No Exception, so that nothing under test takes it for its own."""


@pytest.fixture(autouse=True)
def _deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """End a test that hangs; and the run, with all stacks, where it hangs with the GIL held."""
    marker = request.node.get_closest_marker("deadline")
    seconds = kit.patience(marker.args[0] if marker else _DEADLINE)

    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        raise DeadlineExceeded(f"not through after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + kit.patience(30), exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session", autouse=True)
def _importable_by_everybody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the processes that tests start import the package as it is now.

    An editable install looks for changed sources in each process, which takes long, and writes into
    the build directory, which an unprivileged user may not.
    """
    finders = [finder for finder in sys.meta_path if hasattr(finder, "_build_path")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        if finders and not kit.is_plain_install():
            target = tmp_path_factory.mktemp("package")
            kit.copy_package(target / "rdma_mig")
            for path in (target, *target.parents):
                if path.is_relative_to(tmp_path_factory.getbasetemp().parent):
                    path.chmod(0o755)
            patch.setenv("PYTHONPATH", str(target), prepend=":")
            patch.setenv("PYTHONSAFEPATH", "1")
            patch.setenv("MESONPY_EDITABLE_SKIP", ":".join(str(f._build_path) for f in finders))
            for finder in finders:
                # Under another name of the same directory this process goes on with it: modules are
                # loaded when they are needed.
                patch.setattr(finder, "_build_path", f"{finder._build_path}/.")
        yield


@pytest.fixture
def address() -> str:
    """An address of the verbs device; without a device the test fails."""
    return kit.device()[1]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A snapshot to send: three blocks, 8 MiB, little of it not zero."""
    with snapshot_kit.guest(kit.BLOCKS) as memories:
        kit.paint(memories)
        return snapshot_kit.keep(tmp_path / "kept", memories, kit.BLOCKS)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty directory: what a destination leaves behind shows in it."""
    path = tmp_path / "room"
    path.mkdir()
    return path


@pytest.fixture
def engine() -> Iterator[hooks_kit.Engine]:
    engine = hooks_kit.Engine()
    try:
        yield engine
    finally:
        engine.process.kill()
        engine.process.communicate()


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(kit.BLOCKS) as ram:
        for guest in ram:
            with guest.memory.view() as view:
                view[:] = snapshot_kit.noise(len(view), guest.index)
        yield ram
