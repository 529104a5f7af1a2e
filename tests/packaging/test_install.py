# SPDX-License-Identifier: Apache-2.0
"""What an installed package can do where something of RDMA is missing, and how it says so.

Four environments: the wheel without RDMA layer in a virtual environment that sees nothing of the
system's Python; and the ordinary wheel where pyverbs, the RDMA libraries, or both are hidden from
a mount namespace, so that the programs really do not find them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import packaging_kit as kit
import pytest

pytestmark = pytest.mark.packaging

DONE, FAILED, USAGE, HOST_CANNOT = 0, 1, 2, 3
LIBRARIES = ("libibverbs.so", "librdmacm.so")

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import rdma_mig
names = [m.name for m in pkgutil.walk_packages(rdma_mig.__path__, "rdma_mig.")]
names.remove("rdma_mig._verbs") if "rdma_mig._verbs" in names else None
for name in names:
    importlib.import_module(name)
loaded = [name for name in sys.modules if name.split(".")[0] == "pyverbs"]
maps = open("/proc/self/maps").read()
print(rdma_mig.__file__)
print(*names)
print(*loaded, *(lib for lib in ("libibverbs", "librdmacm") if lib in maps))
"""

# Blocks that can be sent: whole pages, and no guest addresses.
MAKE_SNAPSHOT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import snapshot_kit as kit
from rdma_mig.memory import RamBlock
blocks = (RamBlock("pc.ram", 8 * kit.MIB), RamBlock("pc.rom", kit.MIB))
with kit.guest(blocks) as memories:
    kit.paint(memories)
    kit.keep(Path(sys.argv[2]), memories, blocks)
"""


@dataclasses.dataclass
class Installed:
    """An installed rdma-mig: its Python, what is hidden from it, and what it must say for that."""

    python: Path
    prefix: tuple[str, ...] = ()
    layer: bool = True
    pyverbs: bool = True
    reason: str = ""

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.prefix, *map(str, command)],
            env=kit.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def execute(self, script: str, *arguments: str | Path) -> str:
        done = self.run(self.python, "-I", "-c", script, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rdma_migrate(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run(self.python.with_name("rdma-migrate"), *arguments)


def hide(paths: list[Path]) -> tuple[str, ...]:
    """A command prefix: a mount namespace in which these paths below /usr do not exist.

    An overlay of /usr and a layer that consists of whiteouts. Nothing of the host is touched, and
    everything else stays where it is.
    """
    assert paths
    assert all(path.is_relative_to("/usr") for path in paths), paths
    whiteouts = [path.relative_to("/usr") for path in paths]
    lines = ["set -e", "mount -t tmpfs none /mnt"]
    lines += [f"mkdir -p '/mnt/usr/{folder}'" for folder in sorted({p.parent for p in whiteouts})]
    lines += [f"mknod '/mnt/usr/{path}' c 0 0" for path in whiteouts]
    lines += ["mount -t overlay -o lowerdir=/mnt/usr:/usr none /usr", 'exec "$@"']
    namespace = ["--mount"] if os.geteuid() == 0 else ["--map-root-user", "--mount"]
    prefix = ("unshare", *namespace, "sh", "-c", "\n".join(lines), "hide")
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.fail(
            f"no mount namespace with an overlay here ({tried.stderr.strip()}): a container needs "
            "--privileged, a user needs user namespaces (kernel.unprivileged_userns_clone=1)",
            pytrace=False,
        )
    return prefix


def pyverbs_paths(python: Path) -> list[Path]:
    found = kit.check([python, "-I", "-c", "import pyverbs; print(*pyverbs.__path__, sep='\\n')"])
    return [Path(line).resolve() for line in found.splitlines()]


def library_paths() -> list[Path]:
    listed = kit.check(["/sbin/ldconfig", "-p"])
    names = "|".join(re.escape(name) for name in LIBRARIES)
    folders = {
        Path(path).resolve().parent
        for path in re.findall(rf"^\s(?:{names})\S* .*=> (\S+)$", listed, re.MULTILINE)
    }
    return sorted({p for folder in folders for name in LIBRARIES for p in folder.glob(f"{name}*")})


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ordinary wheel as README installs it; returns its Python."""
    venv = tmp_path_factory.mktemp("full") / "venv"
    python = kit.make_venv(venv, system_packages=True)
    kit.install(python, wheel)
    return python


def _bare(request: pytest.FixtureRequest) -> Installed:
    tmp: Path = request.getfixturevalue("tmp_path_factory").mktemp("bare")
    python = kit.make_venv(tmp / "venv", system_packages=False)
    kit.install(python, request.getfixturevalue("bare_wheel"))
    kit.check([kit.PYTHON, "-m", "pip", "--python", python, "check"])
    return Installed(python, layer=False, pyverbs=False, reason="pyverbs")


def _without_pyverbs(request: pytest.FixtureRequest) -> Installed:
    python = request.getfixturevalue("full")
    return Installed(python, hide(pyverbs_paths(python)), pyverbs=False, reason="pyverbs")


def _without_libraries(request: pytest.FixtureRequest) -> Installed:
    python = request.getfixturevalue("full")
    return Installed(python, hide(library_paths()), reason="librdmacm.so.1")


def _without_either(request: pytest.FixtureRequest) -> Installed:
    python = request.getfixturevalue("full")
    hidden = hide(pyverbs_paths(python) + library_paths())
    return Installed(python, hidden, pyverbs=False, reason="pyverbs")


_ENVIRONMENTS: dict[str, Callable[[pytest.FixtureRequest], Installed]] = {
    "bare": _bare,
    "without-pyverbs": _without_pyverbs,
    "without-libraries": _without_libraries,
    "without-either": _without_either,
}


@pytest.fixture(scope="module", params=list(_ENVIRONMENTS))
def installed(request: pytest.FixtureRequest) -> Installed:
    """One environment after the other in which RDMA cannot be used."""
    return _ENVIRONMENTS[request.param](request)


@pytest.fixture(scope="module")
def snapshot(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot that the installed package itself has written."""
    path = tmp_path_factory.mktemp("snapshot") / "vm"
    installed.execute(MAKE_SNAPSHOT, kit.PROJECT / "tests" / "snapshot", path)
    return path


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert text.endswith("\n")
    assert text.startswith("rdma-migrate: ")
    return text


def test_the_ordinary_wheel_loads_the_rdma_layer_where_nothing_is_hidden(full):
    """Without this, the tests below would hold for a wheel that never loads it."""
    ordinary = Installed(full)
    loaded = ordinary.execute(
        "import rdma_mig._verbs; from rdma_mig.verbs.loading import load; print(load().__name__); "
        "print([l for l in ('libibverbs', 'librdmacm') if l in open('/proc/self/maps').read()])"
    )
    assert loaded.split("\n")[:2] == ["rdma_mig._verbs", "['libibverbs', 'librdmacm']"]
    version = ordinary.rdma_migrate("--version").stdout
    assert version == f"rdma-migrate {kit.source_version()} (with RDMA layer, pyverbs found)\n"


def test_rdma_is_really_missing(installed):
    pyverbs = installed.run(installed.python, "-I", "-c", "import pyverbs.device")
    layer = installed.run(installed.python, "-I", "-c", "import rdma_mig._verbs")
    assert pyverbs.returncode == 1
    assert layer.returncode == 1
    assert "ImportError" in layer.stderr or "ModuleNotFoundError" in layer.stderr


def test_every_module_can_be_imported(installed, tree):
    where, names, loaded = installed.execute(IMPORT_EVERYTHING).splitlines()
    assert Path(where).is_relative_to(installed.python.parents[1])
    sources = tree / "rdma_mig"
    wanted = {
        ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")
        for path in sources.rglob("*.py")
    }
    assert set(names.split()) == wanted - {"rdma_mig"} | {
        f"rdma_mig.{layer}" for layer in ("_dirty", "_hooks", "_mapped", "_pages", "_stream")
    }
    assert loaded == "", "importing a module has loaded pyverbs or the RDMA libraries"


def test_help_and_version(installed):
    version = installed.rdma_migrate("--version")
    assert (version.returncode, version.stderr) == (DONE, "")
    layer = "with" if installed.layer else "without"
    pyverbs = "found" if installed.pyverbs else "not found"
    assert version.stdout == (
        f"rdma-migrate {kit.source_version()} ({layer} RDMA layer, pyverbs {pyverbs})\n"
    )
    for arguments in ([], ["incoming"], ["outgoing"], ["inspect"]):
        shown = installed.rdma_migrate(*arguments, "--help")
        assert (shown.returncode, shown.stderr) == (DONE, "")
        assert shown.stdout.startswith(f"usage: {' '.join(['rdma-migrate', *arguments])}")


def test_inspect(installed, snapshot):
    done = installed.rdma_migrate("inspect", snapshot, "--json", "--verify")
    assert (done.returncode, done.stderr) == (DONE, "")
    report = json.loads(done.stdout)
    assert report["machine"] == "pc-q35-7.2"
    assert report["verified"] is True
    assert [device["name"] for device in report["description"]["devices"]] == [
        "timer",
        "0000:00:02.0/e1000e",
    ]


def test_inspect_sees_damage(installed, snapshot, tmp_path):
    damaged = tmp_path / "vm"
    kit.check(["cp", "-a", snapshot, damaged])
    with (damaged / "ram" / "0.raw").open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))
    done = installed.rdma_migrate("inspect", damaged, "--verify")
    assert done.returncode == FAILED
    assert "damaged" in one_line(done.stderr)


def test_usage_errors_come_before_missing_rdma(installed, tmp_path):
    done = installed.rdma_migrate("incoming", "vsock:1:2", "--output", tmp_path / "vm")
    assert done.returncode == USAGE
    assert one_line(done.stderr)


def test_a_machine_migrates_without_rdma(installed, snapshot, tmp_path):
    """Through a file, and through a command that is the other end itself."""
    stream, back, piped = tmp_path / "stream", tmp_path / "back", tmp_path / "piped"
    command = installed.python.with_name("rdma-migrate")
    # A copy: that it was sent to somebody is noted in it.
    snapshot = Path(shutil.copytree(snapshot, tmp_path / "vm"))
    for arguments in (
        ("outgoing", snapshot, f"file:{stream}"),
        ("incoming", f"file:{stream}", "--output", back),
        ("incoming", f"exec:{command} outgoing {snapshot} fd:1", "--output", piped),
    ):
        done = installed.rdma_migrate(*arguments)
        assert done.returncode == DONE, done.stderr
    assert stream.stat().st_size > 0
    for copy in (back, piped):
        difference = subprocess.run(
            ["diff", "-r", "-x", "restored", snapshot, copy],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (difference.returncode, difference.stdout) == (0, "")


def test_incoming_says_what_is_missing(installed, tmp_path):
    done = installed.rdma_migrate("incoming", "rdma:127.0.0.1:0", "--output", tmp_path / "vm")
    assert (done.returncode, done.stdout) == (HOST_CANNOT, "")
    message = one_line(done.stderr)
    assert installed.reason in message
    assert "apt-get install" in message
    assert list(tmp_path.iterdir()) == [], "something was left on disk"


def test_outgoing_says_what_is_missing(installed, snapshot):
    done = installed.rdma_migrate("outgoing", snapshot, "rdma:127.0.0.1:4444")
    assert (done.returncode, done.stdout) == (HOST_CANNOT, "")
    message = one_line(done.stderr)
    devices = Path("/sys/class/infiniband")
    if devices.is_dir() and any(devices.iterdir()):
        assert installed.reason in message
    else:
        assert "no RDMA device" in message


def test_a_failure_is_an_event_too(installed, tmp_path):
    done = installed.rdma_migrate(
        "incoming", "rdma:127.0.0.1:0", "--json", "--output", tmp_path / "vm"
    )
    assert done.returncode == HOST_CANNOT
    event = json.loads(done.stdout)
    assert event["event"] == "failed"
    assert event["exit_status"] == HOST_CANNOT
    assert installed.reason in event["message"]


# ---- the editable install of CONTRIBUTING.md ----


@pytest.mark.full
def test_an_editable_install_follows_the_tree(tree, tmp_path):
    """`make setup` makes one for every test run; this one shows that edits take effect.

    The build tools are this environment's, seen through a .pth file.
    """
    copy = tmp_path / "rdma-mig"
    kit.check(["git", "clone", "--quiet", tree, copy])
    python = kit.make_venv(tmp_path / "venv", system_packages=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    tools = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "tools.pth").write_text(f"{tools}\n")
    kit.install(
        python,
        "--no-build-isolation",
        "--no-deps",
        "--config-settings=setup-args=-Dverbs=disabled",
        "--editable",
        copy,
    )
    look = "import rdma_mig._pages as p, rdma_mig.waits as w; print(w.__file__); print(p.EDITED)"
    here = {"cwd": tmp_path, "env": kit.environment()}
    before = subprocess.run(
        [python, "-c", look], **here, capture_output=True, text=True, timeout=60, check=False
    )
    assert before.returncode == 1
    assert before.stdout == f"{copy / 'rdma_mig' / 'waits.py'}\n"
    with (copy / "cext" / "_pages.pyx").open("a") as source:
        source.write("\nEDITED = 'rebuilt'\n")
    assert kit.check([python, "-c", look], **here).splitlines()[1] == "rebuilt"
