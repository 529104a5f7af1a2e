# SPDX-License-Identifier: Apache-2.0
"""What this host lacks ends in one line that names it and the command that mends it, exit 3.

Each test first shows that the plain thing fails as well, so that it is not passed by something
else that fails.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import rdma_kit as kit
import snapshot_kit

from rdma_mig.memory import RamBlock

pytestmark = [pytest.mark.rdma, pytest.mark.root]

PYTHON = sys.executable
COMMAND = str(Path(sys.executable).with_name("rdma-migrate"))
NOBODY = 65534
UNPRIVILEGED = [
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
    "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
]  # fmt: skip
PRIVATE = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
DEV = Path("/dev/infiniband")


def run(*command: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *command], check=False, capture_output=True, text=True,
        timeout=kit.patience(60), stdin=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip


def fails_plainly(code: str, error: str, prefix: Sequence[str] = ()) -> None:
    """Show that a few lines of Python fail with this error, without rdma-mig."""
    result = run(PYTHON, "-c", code, prefix=prefix)
    assert result.returncode == 1, f"it did not fail: {result.stdout}{result.stderr}"
    assert error in result.stderr.splitlines()[-1]


def refused(
    *arguments: str | Path,
    prefix: Sequence[str] = (),
    named: str,
    remedy: str,
    left: Path | None = None,
) -> str:
    """Run rdma-migrate, which must end with exit 3 and one line with both in it."""
    result = run(COMMAND, *map(str, arguments), prefix=prefix)
    told = f"{result.returncode}: {result.stdout}{result.stderr}"
    assert result.returncode == 3, told
    assert result.stdout == "" or result.stdout.startswith("listening on "), told
    lines = [line for line in result.stderr.splitlines() if line.startswith("rdma-migrate:")]
    assert len(lines) == 1, told
    assert "Traceback" not in result.stderr, told
    assert named in lines[0], lines[0]
    assert remedy in lines[0], lines[0]
    if left is not None:
        assert list(left.iterdir()) == []
    return lines[0]


def device_file() -> Path:
    """The uverbs file of the device under test."""
    for entry in Path("/sys/class/infiniband_verbs").glob("uverbs*"):
        if (entry / "ibdev").read_text().strip() == kit.device()[0]:
            return DEV / entry.name
    raise AssertionError("the device has no uverbs file")


@contextlib.contextmanager
def mode(paths: Sequence[Path], bits: int) -> Iterator[None]:
    """Give device files a mode for as long as the block lasts."""
    before = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    try:
        for path in paths:
            path.chmod(bits)
        yield
    finally:
        for path, old in before.items():
            path.chmod(old)


@pytest.fixture
def everybodys(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that an unprivileged user can work in."""
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to(tmp_path_factory.getbasetemp().parent):
            path.chmod(0o755)
    room = tmp_path / "everybodys"
    room.mkdir()
    os.chown(room, NOBODY, NOBODY)
    return room


def opened(path: Path) -> str:
    return f"import os; os.open({str(path)!r}, os.O_RDWR)"


# ---- permission ----


@pytest.mark.parametrize("which", ["uverbs", "rdma_cm", "both"])
def test_device_files_that_may_not_be_opened(everybodys, address, which):
    files = {
        "uverbs": sorted(DEV.glob("uverbs*")),
        "rdma_cm": [DEV / "rdma_cm"],
        "both": [DEV / "rdma_cm", *sorted(DEV.glob("uverbs*"))],
    }[which]
    with mode(files, 0o600):
        fails_plainly(opened(files[0]), "Permission denied", UNPRIVILEGED)
        line = refused(
            "incoming", f"rdma:{address}:0", "-o", everybodys / "vm",
            prefix=UNPRIVILEGED, named=" may not be opened", remedy="chmod 0666 ", left=everybodys,
        )  # fmt: skip
        # Of several that are all the same, any one is named.
        named = line.split(" may not")[0].removeprefix("rdma-migrate: ")
        assert named in map(str, files if which == "uverbs" else files[:1])
        assert f"chmod 0666 {named} " in line
        assert f"user {NOBODY}" in line


def test_only_the_device_that_is_needed_may_not_be_opened(everybodys, address):
    with mode([device_file()], 0o600):
        fails_plainly(opened(device_file()), "Permission denied", UNPRIVILEGED)
        refused(
            "incoming", f"rdma:{address}:0", "-o", everybodys / "vm", prefix=UNPRIVILEGED,
            named=str(device_file()), remedy=f"chmod 0666 {device_file()}", left=everybodys,
        )  # fmt: skip


# ---- addresses ----

LISTEN = """
import sys, socket
from pyverbs.cmid import CMID, CMEventChannel
from rdma_mig import _verbs
from rdma_mig.verbs.addresses import pack
channel = CMEventChannel()
cmid = CMID(creator=channel)
_verbs.bind_address(cmid, pack((socket.AF_INET, sys.argv[1], int(sys.argv[2]))))
cmid.listen(1)
print("listening", flush=True)
sys.stdin.read()
"""


def test_port_that_is_taken(room, address):
    with kit.RawListener() as listener:
        port = str(listener.listener.address[1])
        plain = run(PYTHON, "-c", LISTEN, address, port)
        assert plain.returncode == 1
        assert "Address already in use" in plain.stderr
        refused(
            "incoming", f"rdma:{address}:{port}", "-o", room / "vm",
            named=f"port {port} at {address} is taken", remedy="rdma resource show cm_id",
            left=room,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a..b", "x" * 64 + ".invalid"])
def test_name_that_does_not_resolve(room, kept, name):
    with pytest.raises((OSError, UnicodeError)):
        __import__("socket").getaddrinfo(name, 1)
    refused("incoming", f"rdma:{name}:1", "-o", room / "vm", named=name[:64], remedy="", left=room)
    refused("outgoing", kept, f"rdma:{name}:1", named=name[:64], remedy="")


def test_address_that_is_no_rdma_devices(room):
    plain = run(PYTHON, "-c", LISTEN, "203.0.113.1", "0")
    assert plain.returncode == 1
    assert "OSError" in plain.stderr
    line = refused(
        "incoming", "rdma:203.0.113.1:0", "-o", room / "vm",
        named="203.0.113.1 is not the address of an RDMA device", remedy="rdma link show",
        left=room,
    )  # fmt: skip
    assert kit.device()[0] in line


def test_destination_without_an_rdma_path(kept):
    refused("outgoing", kept, "rdma:203.0.113.9:1", named="203.0.113.9", remedy="rdma link show")


# ---- memory that may not be locked ----

REGISTER = """
import sys
from pyverbs.device import Context
from pyverbs.pd import PD
from pyverbs.mr import MR
with Context(name=sys.argv[1]) as context, PD(context) as pd:
    MR(pd, int(sys.argv[2]), 1).close()
print("registered")
"""


def limited(size: int) -> list[str]:
    return ["prlimit", f"--memlock={size}", *UNPRIVILEGED]


def keep(path: Path, mib: int) -> Path:
    blocks = (RamBlock("pc.ram", mib * kit.MIB),)
    with snapshot_kit.guest(blocks) as memories:
        with memories[0].view() as view:
            view[: kit.MIB] = snapshot_kit.noise(kit.MIB)
        snapshot_kit.keep(path, memories, blocks)
    for entry in [path, *path.rglob("*")]:
        os.chown(entry, NOBODY, NOBODY)
    return path


@pytest.mark.parametrize(("limit", "what"), [(1, "control buffers"), (5, "RAM block pc.ram")])
def test_memory_that_may_not_be_locked(everybodys, limit, what):
    kept = keep(everybodys.parent / "kept", 16)
    prefix = limited(limit * kit.MIB)
    plain = run(PYTHON, "-c", REGISTER, kit.device()[0], str(16 * kit.MIB), prefix=prefix)
    assert plain.returncode == 1
    assert "Cannot allocate memory" in plain.stderr
    assert run(PYTHON, "-c", REGISTER, kit.device()[0], "4096", prefix=prefix).returncode == 0
    with kit.RawListener() as listener:
        listener.serve("blocks told")
        # With pin-all it is known before anything is connected that RAM will not fit.
        pin_all = [] if limit == 1 else ["--rdma-pin-all"]
        line = refused(
            "outgoing", kept, listener.uri, *pin_all, prefix=prefix,
            named=what if limit == 1 else "16 MiB of guest RAM", remedy="ulimit -l unlimited",
        )  # fmt: skip
        assert f"may lock {limit} MiB" in line
    with listening(everybodys / "vm", prefix) as (process, uri):
        with contextlib.suppress(Exception), kit.dial(uri) as peer:
            kit.until("blocks known", kit.act_as_source(peer))
        _, err = process.communicate(timeout=kit.patience(30))
    assert process.returncode == 3, err
    lines = [line for line in err.splitlines() if line.startswith("rdma-migrate:")]
    assert len(lines) == 1
    assert what in lines[0]
    assert "ulimit -l unlimited" in lines[0]
    assert list(everybodys.iterdir()) == []


@contextlib.contextmanager
def listening(output: Path, prefix: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen, str]]:
    """``rdma-migrate incoming``, when a source can connect to it."""
    process = subprocess.Popen(
        [*prefix, COMMAND, "incoming", f"rdma:{kit.device()[1]}:0", "-o", output],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd="/",
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on "), line + process.stderr.read()
        yield process, line.split()[-1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("option", [["--rdma-pin-all"], []], ids=["pin-all", "dynamic"])
def test_whole_migration_as_an_unprivileged_user_within_its_limit(everybodys, option):
    """Device files for everybody, no CAP_IPC_LOCK, and a limit that holds what is registered."""
    kept = keep(everybodys.parent / "kept", 16)
    limit = 24 * kit.MIB
    plain = run(
        PYTHON, "-c", REGISTER, kit.device()[0], str(32 * kit.MIB), prefix=limited(limit)
    )  # the limit holds: this user has no CAP_IPC_LOCK
    assert "Cannot allocate memory" in plain.stderr
    with (
        mode(sorted({DEV / "rdma_cm", *DEV.glob("uverbs*")}), 0o666),
        listening(everybodys / "vm", limited(limit)) as (process, uri),
    ):
        sent = run(COMMAND, "outgoing", str(kept), uri, *option, prefix=limited(limit))
        _, err = process.communicate(timeout=kit.patience(60))
    assert sent.returncode == 0, sent.stderr + err
    assert process.returncode == 0, err
    assert (everybodys / "vm").stat().st_uid == NOBODY
    assert run("diff", "-r", str(kept), str(everybodys / "vm")).returncode == 0


# ---- things that are not there ----


def hidden(what: str, how: str) -> list[str]:
    """A mount namespace of its own in which something is not there."""
    return [*PRIVATE, f'{how} "{what}"; exec "$@"', "hidden"]


def empty_directory(path: str) -> list[str]:
    return hidden(path, "mount -t tmpfs none")


def empty_file(path: str) -> list[str]:
    return hidden(path, "mount --bind /dev/null")


def test_no_device(room, kept, address):
    prefix = empty_directory("/sys/class/infiniband")
    assert run("ls", "/sys/class/infiniband", prefix=prefix).stdout == ""
    for arguments in (
        ["incoming", f"rdma:{address}:0", "-o", room / "vm"],
        ["outgoing", kept, f"rdma:{address}:1"],
    ):
        refused(
            *arguments, prefix=prefix, named="no RDMA device", remedy="rdma link add", left=room
        )


def test_no_device_files(room, address):
    prefix = empty_directory("/dev/infiniband")
    fails_plainly(opened(DEV / "rdma_cm"), "No such file", prefix)
    refused(
        "incoming", f"rdma:{address}:0", "-o", room / "vm", prefix=prefix,
        named="/dev/infiniband/rdma_cm does not exist", remedy="modprobe rdma_ucm", left=room,
    )  # fmt: skip


def module_directory(name: str) -> str:
    found = run(PYTHON, "-c", f"import {name}; print({name}.__path__[0])")
    return found.stdout.strip()


def test_no_pyverbs(room, kept, address):
    prefix = empty_directory(module_directory("pyverbs"))
    fails_plainly("import pyverbs.device", "ModuleNotFoundError", prefix)
    for arguments in (
        ["incoming", f"rdma:{address}:0", "-o", room / "vm"],
        ["outgoing", kept, f"rdma:{address}:1"],
    ):
        refused(
            *arguments, prefix=prefix, named="pyverbs", remedy="apt-get install python3-pyverbs",
            left=room,
        )  # fmt: skip
    assert run(COMMAND, "inspect", str(kept), prefix=prefix).returncode == 0


@pytest.mark.parametrize("library", ["libibverbs.so.1", "librdmacm.so.1"])
def test_library_that_cannot_be_loaded(room, kept, address, library):
    path = run(
        PYTHON, "-c",
        f"import ctypes; ctypes.CDLL({library!r}); "
        f"print(next(l.split()[-1] for l in open('/proc/self/maps') if {library[:-2]!r} in l))",
    ).stdout.strip()  # fmt: skip
    prefix = empty_file(path)
    fails_plainly(f"import ctypes; ctypes.CDLL({library!r})", "file too short", prefix)
    refused(
        "incoming", f"rdma:{address}:0", "-o", room / "vm", prefix=prefix, named=library,
        remedy="apt-get install", left=room,
    )  # fmt: skip
    assert run(COMMAND, "inspect", str(kept), prefix=prefix).returncode == 0
    assert run(COMMAND, "--version", prefix=prefix).returncode == 0


def test_no_driver_library_for_the_device(room, address):
    """libibverbs is there, and what makes it know the device (ibverbs-providers) is not."""
    drivers = next(Path("/usr/lib").glob("*/libibverbs"))
    prefix = empty_directory(str(drivers))
    plain = run(
        PYTHON, "-c", "from pyverbs.device import get_device_list as g; print(len(g()))",
        prefix=prefix,
    )  # fmt: skip
    assert plain.stdout.strip() == "0" or plain.returncode
    refused(
        "incoming", f"rdma:{address}:0", "-o", room / "vm", prefix=prefix,
        named=kit.device()[0], remedy="ibverbs-providers", left=room,
    )  # fmt: skip
