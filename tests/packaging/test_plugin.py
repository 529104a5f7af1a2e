# SPDX-License-Identifier: Apache-2.0
"""The engine and the guest of another package, which know rdma_mig.plugin only, do what ours do.

That package is tests/plugin_engine; it is installed here as any other would be. Its engine is the
one that docs/plugin.md shows.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import packaging_kit as kit
import pytest

sys.path.insert(0, str(kit.PROJECT / "tests"))

OURS = kit.PROJECT / "tests" / "plugin_engine"
ENGINE = OURS / "toy_engine" / "engine.py"
GUEST_END = Path(__file__).with_name("guest_end.py")
RDMA_MIGRATE = Path(sys.executable).with_name("rdma-migrate")
SECONDS = 180

TRANSPORTS = [
    pytest.param("tcp", {}, id="tcp"),
    pytest.param("unix", {}, id="unix"),
    pytest.param("rdma", {"pin_all": True}, id="rdma-pin-all", marks=pytest.mark.rdma),
    pytest.param("rdma", {"pin_all": False}, id="rdma-dynamic", marks=pytest.mark.rdma),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install that package, if it is not; return the environment of processes that find it."""
    with contextlib.suppress(PackageNotFoundError):
        version("toy-engine")
        return dict(os.environ)  # an image without pip has it installed
    target = tmp_path_factory.mktemp("installed")
    pip = [kit.PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    kit.check([*pip, "--target", target, OURS])
    path = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def address(scheme: str, room: Path) -> str:
    if scheme == "unix":
        return f"unix:{room}/socket"
    if scheme == "tcp":
        return "tcp:127.0.0.1:0"
    from harness import device_address

    return f"rdma:{device_address()[1]}:0"


class End:
    """A process at one end, which tells what happens in lines of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def told(self) -> dict:
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return json.loads(line)

    def succeed(self) -> dict:
        """Wait for its end; return the last thing that it told."""
        out, err = self.process.communicate(timeout=SECONDS)
        assert (self.process.returncode, err) == (0, ""), out + err
        return json.loads(out.splitlines()[-1])


@contextmanager
def started(env: Mapping[str, str], *command: str | Path) -> Iterator[End]:
    python = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning"]
    with subprocess.Popen(
        [*python, *map(str, command)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield End(process)
        finally:
            process.kill()


# ---- the engine ----


def test_page_shows_the_engine_that_is_tested():
    text = (kit.PROJECT / "docs" / "plugin.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert ENGINE.read_text() in shown
    assert len(ENGINE.read_text().splitlines()) < 120


def test_that_package_knows_nothing_but_the_interface():
    used = set()
    for source in OURS.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            else:
                continue
            used |= {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    ours = {name for name in used if not name.startswith("toy_engine.")}
    assert ours
    assert all(f"{name}.".startswith("rdma_mig.plugin.") for name in ours), ours


@pytest.mark.parametrize(("scheme", "options"), TRANSPORTS)
def test_running_machine_moves_by_another_engine(installed, tmp_path, scheme, options):
    given = json.dumps(options)
    with started(installed, "-m", "toy_engine", "incoming", address(scheme, tmp_path)) as incoming:
        uri = incoming.told()["uri"]
        with started(installed, "-m", "toy_engine", "outgoing", uri, given) as outgoing:
            source, destination = outgoing.succeed(), incoming.succeed()
    assert source["digests"] == destination["digests"]
    assert source["counter"] == destination["counter"] > 0
    assert (source["runs"], destination["runs"]) == (False, True)
    assert source["error"] is destination["error"] is None
    # Who has the pages: the hooks of the transport, or the stream.
    assert (source["pages"] > 0) == (scheme == "rdma")


@pytest.mark.parametrize(("scheme", "options"), TRANSPORTS)
def test_machine_that_is_refused_runs_on(installed, tmp_path, scheme, options):
    """The destination has all of its RAM by then, and the source has stopped it."""
    given = json.dumps(options)
    with started(installed, "-m", "toy_engine", "refusing", address(scheme, tmp_path)) as refusing:
        uri = refusing.told()["uri"]
        with started(installed, "-m", "toy_engine", "outgoing", uri, given) as outgoing:
            source, destination = outgoing.succeed(), refusing.succeed()
    assert (source["runs"], destination["runs"]) == (True, False)
    assert "no such counter" in destination["error"]
    assert "the guest goes on running here" in source["error"]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        pytest.param("unix", [], id="unix"),
        pytest.param("rdma", ["--rdma-pin-all"], id="rdma", marks=pytest.mark.rdma),
    ],
)
def test_that_engine_and_the_commands_understand_each_other(installed, tmp_path, scheme, options):
    vm = tmp_path / "vm"
    uri = address(scheme, tmp_path)
    with subprocess.Popen(
        [RDMA_MIGRATE, "incoming", uri, "--output", vm, "--accept-timeout", "120"],
        stdout=subprocess.PIPE,
        text=True,
    ) as incoming:
        try:
            uri = incoming.stdout.readline().removeprefix("listening on ").strip()
            with started(installed, "-m", "toy_engine", "outgoing", uri) as outgoing:
                source = outgoing.succeed()
            assert incoming.wait(SECONDS) == 0
        finally:
            incoming.kill()
    report = kit.check([RDMA_MIGRATE, "inspect", vm, "--verify", "--json"])
    assert json.loads(report)["machine"] == "toy-1.0"
    uri = address(scheme, tmp_path)
    with started(installed, "-m", "toy_engine", "incoming", uri) as incoming:
        kit.check([RDMA_MIGRATE, "outgoing", vm, incoming.told()["uri"], *options])
        destination = incoming.succeed()
    assert source["digests"] == destination["digests"]
    assert source["counter"] == destination["counter"]
    assert destination["runs"]


# ---- guests ----


@pytest.mark.parametrize("guest", ["process", "toy"])
@pytest.mark.parametrize(("scheme", "options"), TRANSPORTS[1:])
def test_guest_becomes_a_snapshot_and_runs_again(installed, tmp_path, guest, scheme, options):
    """Each part of the interface, by each guest: ours, and the one of another package."""
    vm = tmp_path / "vm"
    first, kept = move(installed, tmp_path, scheme, options, [guest], ["snapshot", vm])
    sent, last = move(installed, tmp_path, scheme, options, ["snapshot", vm], [guest])
    assert first["calls"] == ["stop", "save_device_state"]
    assert kept["calls"] == ["prepare", "load_device_state", "resume"]
    assert sent["calls"] == ["stop", "save_device_state"]
    assert last["calls"] == ["prepare", "load_device_state", "resume"]
    assert first["digests"] == kept["digests"] == sent["digests"] == last["digests"]
    assert first["machine"] == kept["machine"] == sent["machine"] == last["machine"]
    assert first["counter"] == last["counter"] > 0
    assert (first["runs"], last["runs"]) == (False, True)
    if guest == "process":
        assert first["found"] > 0


def move(
    env: Mapping[str, str],
    room: Path,
    scheme: str,
    options: dict,
    source: list[str | Path],
    destination: list[str | Path],
) -> tuple[dict, dict]:
    """Move a guest between two processes by this project's engine; return what each end tells."""
    given = json.dumps(options)
    name, *path = destination
    at = address(scheme, room)
    with started(env, GUEST_END, "incoming", name, at, "{}", *path) as incoming:
        uri = incoming.told()["uri"]
        name, *path = source
        with started(env, GUEST_END, "outgoing", name, uri, given, *path) as outgoing:
            return outgoing.succeed(), incoming.succeed()
