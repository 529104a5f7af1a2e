# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate doctor`` on a host without RDMA, and with a peer that plays it false."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Qemu
from harness.output import check_output
from test_cli_usage import COMMAND, one_line, run, without_device

from rdma_mig.host import modules
from rdma_mig.host.adapters import _registration
from rdma_mig.host.findings import Level
from rdma_mig.memory.dirty import kernel_trackers

LEVELS = ("ok", "warning", "blocker")


def findings(*options: str, status: int = 3, prefix: list[str] | None = None) -> dict[str, list]:
    """Run doctor without a device; return the findings of each check."""
    result = run("doctor", "--json", *options, prefix=[*(prefix or []), *without_device()])
    assert (result.returncode, result.stderr) == (status, "")
    report = check_output("doctor", json.loads(result.stdout))
    assert set(report) == {"host", "level", "findings"}
    assert report["host"] == socket.gethostname()
    by_check: dict[str, list] = {}
    for finding in report["findings"]:
        assert set(finding) == {"check", "level", "message", "remedy"}
        assert finding["level"] in LEVELS
        assert finding["level"] == "ok" or finding["remedy"], finding
        by_check.setdefault(finding["check"], []).append(finding)
    ranks = [LEVELS.index(finding["level"]) for finding in report["findings"]]
    assert report["level"] == LEVELS[max(ranks)]
    return by_check


GIB = 1 << 30


@pytest.mark.parametrize(
    ("ram", "level", "remedy"),
    [
        (None, Level.OK, ""),
        (4 * GIB, Level.OK, ""),
        (4 * GIB + 1, Level.WARNING, "--rdma-pin-all"),
        (8 * GIB, Level.WARNING, "--rdma-pin-all"),
        (8 * GIB + 1, Level.WARNING, "leave rdma-pin-all off"),
    ],
)
def test_ram_is_held_against_the_regions_that_a_device_takes(ram, level, remedy):
    found = _registration("mlx5_0", count=4096, size=8 * GIB, ram=ram, on_demand="no")
    assert found.level is level
    assert remedy in found.remedy
    assert bool(found.remedy) is (level is Level.WARNING)
    assert found.message.startswith("mlx5_0 registers up to 4096 regions, each of up to 8192 MiB")


def test_host_without_a_device_is_told_how_to_make_one():
    [finding] = findings()["devices"]
    assert finding["level"] == "blocker"
    assert finding["message"] == "this host has no RDMA device"
    assert "rdma link add rxe0 type rxe netdev" in finding["remedy"]


@pytest.mark.parametrize(
    ("has", "said", "remedy"),
    [
        (
            "kernel/drivers/infiniband/core/ib_uverbs.ko: kernel/lib/x.ko\n"
            "kernel/drivers/infiniband/core/rdma_ucm.ko.xz:\n",
            "the kernel runs without ib_uverbs and rdma_ucm",
            "modprobe -a ib_uverbs rdma_ucm",
        ),
        (
            "kernel/drivers/infiniband/core/ib_uverbs.ko:\n",
            "has no such module here",
            "linux-image",
        ),
        (None, "has no such module here", "apt-get install linux-image-amd64"),
    ],
)
def test_modules_that_are_missing(tmp_path, monkeypatch, has, said, remedy):
    if has is not None:
        (tmp_path / "modules.dep").write_text(has)
    nothing = dict.fromkeys(("ib_uverbs", "rdma_ucm"), tmp_path / "nothing")
    monkeypatch.setattr(modules, "_SHOWN", nothing)
    monkeypatch.setattr(modules, "Path", lambda *_: tmp_path)
    [found] = modules.modules()
    assert found.level is Level.BLOCKER
    assert said in found.message
    assert remedy in found.remedy


def test_modules_of_this_host():
    [found] = findings()["modules"]
    there = [shown.exists() for shown in modules._SHOWN.values()]
    assert found["level"] == ("ok" if all(there) else "blocker")


def test_text_says_the_same():
    result = run("doctor", prefix=without_device())
    assert result.returncode == 3
    assert "  BLOCKER devices: this host has no RDMA device\n          load" in result.stdout


def test_guest_that_does_not_fit_is_a_blocker():
    [small], [large] = findings("--ram", "1M")["memory"], findings("--ram", "1000T")["memory"]
    assert (small["level"], large["level"]) == ("ok", "blocker")
    assert "1024000.0 GiB of guest RAM are needed" in large["message"]


def test_limit_on_locked_memory_is_judged_by_the_guest():
    limited = ["prlimit", f"--memlock={8 << 20}", "setpriv", "--bounding-set=-ipc_lock"]
    small = findings("--ram", "4M", prefix=limited)["memlock"][0]
    large = findings("--ram", "64M", prefix=limited)["memlock"][0]
    unknown = findings(prefix=limited)["memlock"][0]
    assert [finding["level"] for finding in (small, large, unknown)] == ["ok", "blocker", "warning"]
    assert "64 MiB of guest RAM would have to be pinned" in large["message"]
    assert "may lock 8 MiB" in large["message"]
    assert "ulimit -l unlimited" in large["remedy"]


# What a container's seccomp profile does: userfaultfd is refused, whatever the kernel has.
_NO_USERFAULTFD = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 323), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_what_the_kernel_tells_of_written_pages():
    names = ["PAGEMAP_SCAN", "userfaultfd write-protection", "soft-dirty bits"]
    [finding] = findings()["dirty-tracking"]
    working = [name for name, why in zip(names, kernel_trackers().values(), strict=True) if not why]
    said = finding["message"].partition("(")[0]
    assert finding["level"] == "ok"
    assert [name for name in names if name in said] == working
    assert all(name in finding["message"] for name in names)


def test_kernel_that_is_not_allowed_to_tell():
    hidden = 'mount --bind /dev/null /dev/userfaultfd 2>/dev/null; exec "$@"'
    limited = ["unshare", "-m", "sh", "-c", hidden, "sh"]
    limited += [sys.executable, "-c", _NO_USERFAULTFD, shutil.which("env")]
    [finding] = findings(prefix=limited)["dirty-tracking"]
    said, _, lacking = finding["message"].partition("(")
    assert "PAGEMAP_SCAN" not in said
    assert "PAGEMAP_SCAN: userfaultfd" in lacking
    if "soft-dirty" not in said:
        assert "has to mark its writes" in lacking
        assert "userfaultfd allowed" in finding["remedy"]


def test_device_that_is_not_there():
    found = findings("--rdma-device", "mlx9_9")["devices"]
    assert any("no RDMA device 'mlx9_9'" in finding["message"] for finding in found)


# ---- a QEMU ----


def test_settings_of_a_running_qemu_that_rdma_does_not_carry(tmp_path):
    path = tmp_path / "second.qmp"
    extra = ["-qmp", f"unix:{path},server=on,wait=off"]
    with Qemu(machine="q35", paused=True, extra=extra) as qemu:
        found = findings("--qmp", str(path))
        assert re.match(
            r"QEMU \d+\.\d+\.\d+, its machine is prelaunch", found["qemu"][0]["message"]
        )
        assert found["max-bandwidth"][0]["level"] == "warning"
        assert all(finding["level"] == "ok" for finding in found["capability"])
        qemu.set_parameter("max-bandwidth", 10**11)
        qemu.set_capability("multifd")
        found = findings("--qmp", str(path))
        assert found["max-bandwidth"][0]["level"] == "ok"
        [multifd] = [f for f in found["capability"] if "multifd" in f["message"]]
        assert multifd["level"] == "blocker"
        assert '"capability": "multifd", "state": false' in multifd["remedy"]


def test_qmp_socket_that_is_not_there(tmp_path):
    [finding] = findings("--qmp", str(tmp_path / "none"))["qemu"]
    assert finding["level"] == "blocker"
    assert "cannot be asked" in finding["message"]


# ---- a peer ----


@contextlib.contextmanager
def answering(answer: bytes, *, then_close: bool = True) -> Iterator[str]:
    """A host that says this to whoever asks; yields HOST:PORT."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 20)
                with contextlib.suppress(OSError):
                    sock.sendall(answer)
                if not then_close:
                    done.wait(60)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


REPORT = {"host": "h", "level": "ok", "findings": []}
FINDING = {"check": "c", "level": "ok", "message": "m", "remedy": ""}
MANY = json.dumps({"api": 1, "report": REPORT | {"findings": [FINDING] * 257}}).encode() + b"\n"


@pytest.mark.parametrize(
    ("answer", "said", "status"),
    [
        (b"", "closed the connection; awaited was its report", 1),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no rdma-migrate doctor of this version", 4),
        (b"[" * 100000 + b"\n", "is no rdma-migrate doctor of this version", 4),
        (b'{"api": 2}\n', "is no rdma-migrate doctor of this version", 4),
        (b'{"api": 1}\n', "sent no report", 4),
        (b"x" * (2 << 20), "sent more than 1048576 bytes", 4),
        (json.dumps({"api": 1, "report": REPORT}).encode() + b"\n", "neither where it listens", 4),
        (
            json.dumps({"api": 1, "report": REPORT | {"findings": [1]}}).encode() + b"\n",
            "sent a finding that is none", 4,
        ),
        (
            MANY,
            "sent no report", 4,
        ),
    ],
)  # fmt: skip
def test_peer_that_does_not_play_its_part(answer, said, status):
    with answering(answer) as peer:
        assert said in one_line(run("doctor", "--peer", peer, prefix=without_device()), status)


def test_peer_that_is_not_there_is_named_with_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = f"127.0.0.1:{listener.getsockname()[1]}"
    line = one_line(run("doctor", "--peer", peer, prefix=without_device()), 3)
    assert f"{peer} cannot be reached over TCP: Connection refused" in line
    assert "rdma-migrate doctor --serve" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_wait_for_a_host_that_drops_connections(number):
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # the kernel drops what comes behind these
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with asking(f"--peer=127.0.0.1:{full.getsockname()[1]}") as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(4)
            assert "cancelled while waiting for the connection" in ended_by(number, process)


def test_text_of_a_peer_cannot_reach_the_terminal_raw():
    report = REPORT | {"findings": [FINDING | {"message": "\x1b[2Jgone"}]}
    answer = {"api": 1, "report": report, "error": "none", "remedy": "r"}
    with answering(json.dumps(answer).encode() + b"\n") as peer:
        result = run("doctor", "--peer", peer, prefix=without_device())
    assert result.returncode == 3
    assert "\x1b" not in result.stdout
    assert "\\x1b[2Jgone" in result.stdout
    assert "takes no RDMA: none" in result.stdout


@pytest.mark.parametrize("peer", ["", ":1", "h:65536", "h:x", "[::1", "[::1]:"])
def test_wrong_peer_is_wrong_usage(peer):
    result = run("doctor", f"--peer={peer}", prefix=without_device())
    assert result.returncode in (2, 3), result


@contextlib.contextmanager
def serving(prefix: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``doctor --serve`` that waits for somebody to ask; yields it and HOST:PORT."""
    process = subprocess.Popen(
        [*prefix, COMMAND, "doctor", "--serve", "127.0.0.1:0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        assert line.startswith("serving on 127.0.0.1:"), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_server_that_waits(number):
    with serving(without_device()) as (process, _):
        assert "cancelled while waiting for a host that asks" in ended_by(number, process)


def ended_by(number: int, process: subprocess.Popen[str]) -> str:
    """Send a signal; return the one line that it ends in, with status 5 and in time."""
    began = time.monotonic()
    process.send_signal(number)
    _output, told = process.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert (process.returncode, told.count("\n")) == (5, 1), told
    return told


@contextlib.contextmanager
def asking(*options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*without_device(), COMMAND, "doctor", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_wait_for_a_qemu_that_does_not_answer(number, tmp_path):
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with asking("--qmp", path, "--peer", "127.0.0.1:1") as process:
            connection, _ = listener.accept()
            with connection:
                assert "interrupted" in ended_by(number, process)


def test_two_hosts_without_rdma_tell_each_other_so():
    with serving(without_device()) as (process, peer):
        asked = run("doctor", "--json", "--peer", peer, prefix=without_device())
        output, told = process.communicate(timeout=30)
    assert (asked.returncode, process.returncode, told) == (3, 3, "")
    ours, theirs = (check_output("doctor", json.loads(text)) for text in (asked.stdout, output))
    assert ours["path"] == theirs["path"]
    assert ours["path"]["level"] == "blocker"
    assert "takes no RDMA" in ours["path"]["message"]
    assert [f["check"] for f in ours["peer"]["findings"]] == [
        f["check"] for f in theirs["findings"]
    ]
