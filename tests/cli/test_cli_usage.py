# SPDX-License-Identifier: Apache-2.0
"""The command line of ``rdma-migrate``: one line and a status for each wrong one."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "snapshot"))

import snapshot_kit
from harness.output import check_output

from rdma_mig.errors import (
    ExitStatus,
    HostError,
    LocalProtocolError,
    MigrationCancelled,
    MigrationError,
    MigrationTimeout,
    PeerGone,
    ProtocolError,
    RemoteProtocolError,
    SnapshotError,
    UsageError,
)

COMMAND = str(Path(sys.executable).with_name("rdma-migrate"))
CLASS = Path("/sys/class/infiniband")


def without_device() -> list[str]:
    """A prefix for a command that shall find no verbs device: nothing where there is none."""
    if not CLASS.exists() or not any(CLASS.iterdir()):
        return []
    return [
        "unshare", "--mount", "--propagation", "private",
        "sh", "-ec", f'mount -t tmpfs none {CLASS}; exec "$@"', "no-device",
    ]  # fmt: skip


def run(
    *arguments: str | Path, prefix: Sequence[str] = (), **options: object
) -> subprocess.CompletedProcess[str]:
    """Run rdma-migrate with a closed standard input."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [*prefix, COMMAND, *map(str, arguments)],
        check=False, stdin=subprocess.DEVNULL, text=True, errors="surrogateescape", timeout=120,
        **streams,
    )  # fmt: skip


def one_line(result: subprocess.CompletedProcess[str], status: int) -> str:
    """Check that a command failed with a status, one line on standard error and nothing else."""
    assert result.returncode == status, result.stdout + result.stderr
    assert not result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("rdma-migrate: ")
    assert lines[0].isprintable()
    return lines[0].removeprefix("rdma-migrate: ")


# ---- usage ----

BAD_URIS = [
    "", ":", "rdma", "rdma:", "rdma::", "rdma:host", "rdma:host:", "rdma::4444", "rdma:[::1]",
    "rdma:[::1:4444", "rdma:::1:4444", "rdma:[nonsense]:1", "rdma:[]:4444", "rdma:h:65536",
    "rdma:h:-1", "rdma:h:0x10", "rdma:h:1.5", "rdma:h: 1", "rdma:h:\u0661", "rdma:h:" + "9" * 400,
    "rdma:h ost:1", "rdma:h/ost:1", "rdma:ho\nst:1", "rdma:user@h:1", "rdma:h:1,bogus=on",
    "rdma:h:1,", "vsock:1:2", "tcp:h", "unix:", "fd:x", "exec:", "file:",
    "RDMA:h:4444", "h:4444", "//h:4444", "rdma://h:4444",
]  # fmt: skip


@pytest.mark.parametrize("uri", BAD_URIS)
@pytest.mark.parametrize("command", ["incoming", "outgoing"])
def test_malformed_uri(tmp_path, command, uri):
    """Found before anything is made on disk, or read from it."""
    room = tmp_path / "room"
    room.mkdir()
    arguments = {
        "incoming": ["incoming", uri, "--output", room / "vm"],
        "outgoing": ["outgoing", room / "vm", uri],
    }[command]
    line = in_process(arguments)
    assert re.search(r"^'.*' (has|lacks) ", line), line
    assert list(room.iterdir()) == []


def in_process(arguments: Sequence[str | Path]) -> str:
    """The same as run() and one_line() of a usage error, without a process each."""
    import io

    from rdma_mig.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
    result = subprocess.CompletedProcess([], int(status), out.getvalue(), err.getvalue())
    return one_line(result, ExitStatus.USAGE)


def test_in_a_process_the_same(tmp_path):
    line = one_line(run("incoming", "vsock:1:2", "-o", tmp_path / "vm"), 2)
    assert line == in_process(["incoming", "vsock:1:2", "-o", tmp_path / "vm"])
    assert "write one of rdma:..., tcp:..." in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["bogus"], "bogus"),
        (["--bogus"], "COMMAND"),
        (["incoming"], "URI"),
        (["incoming", "rdma:h:1"], "--output"),
        (["incoming", "rdma:h:1", "-o"], "expected one argument"),
        (["incoming", "rdma:h:1", "-o", "x", "--bogus"], "--bogus"),
        (["incoming", "rdma:h:1", "-o", "x", "extra"], "extra"),
        (["incoming", "rdma:h:1", "-o", "x", "--timeout", "0"], "positive number"),
        (["incoming", "rdma:h:1", "-o", "x", "--timeout", "-1"], "--timeout"),
        (["incoming", "rdma:h:1", "-o", "x", "--timeout", "nan"], "positive number"),
        (["incoming", "rdma:h:1", "-o", "x", "--timeout", "inf"], "positive number"),
        (["incoming", "rdma:h:1", "-o", "x", "--timeout", "soon"], "positive number"),
        (["incoming", "rdma:h:1", "-o", "x", "--stall-timeout", "1e10"], "positive number"),
        (["incoming", "rdma:h:1", "-o", "x", "--accept-timeout", ""], "positive number"),
        (["incoming", "rdma:h:1", "-o", "x", "--ready-fd", "three"], "--ready-fd"),
        (["incoming", "rdma:h:1", "-o", "x", "--ready-fd", "-1"], "-1"),
        (["incoming", "rdma:h:1", "-o", "x", "--ready-fd", "1234"], "1234 is not an open"),
        (["incoming", "rdma:h:1", "-o", "x", "--ready-fd", "9" * 30], "is not an open descriptor"),
        (["incoming", "rdma:h:1", "-o", "x", "--bogus\nsecond line"], "bogus"),
        (["outgoing"], "DIR"),
        (["outgoing", "dir"], "URI"),
        (["outgoing", "dir", "rdma:h:0"], "for listening only"),
        (["outgoing", "dir", "rdma:h:1", "--output", "x"], "--output"),
        (["inspect"], "DIR"),
        (["inspect", "dir", "more"], "more"),
    ],
)
def test_wrong_arguments(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in in_process(arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["incoming", "--help"], ["outgoing", "-h"]])
def test_help(arguments):
    result = run(*arguments)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("usage: rdma-migrate")
    if arguments == ["--help"]:
        for status in ExitStatus:
            assert re.search(rf"^ *(.* )?{int(status)}  \w", result.stdout, re.MULTILINE), status


def test_version():
    result = run("--version")
    assert result.returncode == 0
    assert re.fullmatch(r"rdma-migrate \d+\.\d+\S* \(.*RDMA layer.*pyverbs.*\)\n", result.stdout)


@pytest.mark.parametrize(
    "statement",
    [
        "import rdma_mig",
        "import rdma_mig.cli.main",
        "import rdma_mig.snapshot, rdma_mig.wire.stream, rdma_mig.memory",
        "from rdma_mig.cli.main import build_parser; build_parser()",
        "from rdma_mig.cli.main import main; main(['inspect', sys.argv[1]])",
    ],
)
def test_rdma_is_not_loaded_before_it_is_needed(statement, tmp_path):
    with snapshot_kit.guest() as memories:
        kept = snapshot_kit.keep(tmp_path / "vm", memories)
    code = (
        f"import sys\n{statement}\n"
        "names = [n for n in sys.modules if n.split('.')[0] == 'pyverbs' or n.endswith('_verbs')]\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert not names, names\n"
        "assert 'libibverbs' not in maps and 'librdmacm' not in maps\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, kept], check=True, stdout=subprocess.DEVNULL, timeout=120
    )


# ---- failures that need no device ----


def test_outgoing_without_a_snapshot(tmp_path):
    line = one_line(run("outgoing", tmp_path / "vm", "rdma:192.0.2.1:1"), 1)
    assert f"there is no snapshot {tmp_path}/vm" in line


DAMAGE = {
    "no manifest": lambda vm: (vm / "manifest.json").unlink(),
    "a manifest of something else": lambda vm: (vm / "manifest.json").write_text("{}"),
    "a newer format": lambda vm: (vm / "manifest.json").write_text(
        re.sub(r'"version": \d+$', '"version": 99', (vm / "manifest.json").read_text(), flags=re.M)
    ),
    "RAM that is short": lambda vm: os.truncate(vm / "ram" / "0.raw", 4096),
    "device state that is gone": lambda vm: (vm / "vmstate.bin").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_outgoing_of_a_damaged_snapshot(tmp_path, damage):
    with snapshot_kit.guest() as memories:
        kept = snapshot_kit.keep(tmp_path / "vm", memories)
    DAMAGE[damage](kept)
    assert str(kept) in one_line(run("outgoing", kept, "rdma:192.0.2.1:1"), 1)


def test_incoming_into_what_exists(tmp_path):
    (tmp_path / "vm").mkdir()
    line = one_line(run("incoming", "rdma:192.0.2.1:0", "-o", tmp_path / "vm"), 1)
    assert "already exists" in line


@pytest.mark.parametrize("command", ["incoming", "outgoing"])
def test_no_device(tmp_path, command):
    with snapshot_kit.guest() as memories:
        kept = snapshot_kit.keep(tmp_path / "vm", memories)
    arguments = {
        "incoming": ["incoming", "rdma:0.0.0.0:0", "-o", tmp_path / "new"],
        "outgoing": ["outgoing", kept, "rdma:192.0.2.1:1"],
    }[command]
    line = one_line(run(*arguments, prefix=without_device()), 3)
    assert "this host has no RDMA device" in line
    assert "rdma link add" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["vm"]


def test_failure_as_json_too(tmp_path):
    import json

    result = run("incoming", "rdma:0.0.0.0:0", "-o", tmp_path / "vm", "--json",
                 prefix=without_device())  # fmt: skip
    assert result.returncode == 3
    (event,) = map(json.loads, result.stdout.splitlines())
    check_output("failed", event)
    assert event["event"] == "failed"
    assert event["exit_status"] == 3
    assert event["message"] == "this host has no RDMA device"
    assert "rdma link add" in event["remedy"]
    assert len(result.stderr.splitlines()) == 1


def test_debug_adds_a_traceback_and_keeps_the_line(tmp_path):
    result = run("outgoing", tmp_path / "vm", "rdma:192.0.2.1:1",
                 env=os.environ | {"RDMA_MIG_DEBUG": "1"})  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("rdma-migrate: there is no snapshot")


# ---- output that nobody reads ----


def test_broken_pipe(tmp_path):
    """A reader that has gone ends a report, quietly."""
    with snapshot_kit.guest() as memories:
        kept = snapshot_kit.keep(tmp_path / "vm", memories)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run("inspect", kept, stdout=writer)
    finally:
        os.close(writer)
    assert result.returncode == 1
    assert result.stderr == ""


@pytest.mark.parametrize("argument", ["--help", "--version"])
@pytest.mark.parametrize("full", [False, True])
def test_help_that_cannot_be_written(argument, full):
    if full:
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    try:
        result = run(argument, stdout=writer)
    finally:
        os.close(writer)
    assert result.returncode == 1
    said = "rdma-migrate: standard output: No space left on device\n" if full else ""
    assert result.stderr == said


def test_migration_that_nobody_watches_says_why_it_failed_all_the_same(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run("incoming", "rdma:0.0.0.0:0", "-o", tmp_path / "vm", "--json", stdout=writer,
                     prefix=without_device())  # fmt: skip
    finally:
        os.close(writer)
    assert result.returncode == 3
    assert result.stderr.startswith("rdma-migrate: this host has no RDMA device")
    assert len(result.stderr.splitlines()) == 1


def test_ready_fd_that_is_closed(tmp_path):
    assert "is not an open descriptor" in one_line(
        run("incoming", "rdma:0.0.0.0:0", "-o", tmp_path / "vm", "--ready-fd", "9"), 2
    )
    assert list(tmp_path.iterdir()) == []


# ---- exit statuses ----


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (MigrationError, 1), (SnapshotError, 1), (PeerGone, 1), (LocalProtocolError, 1),
        (UsageError, 2), (HostError, 3), (ProtocolError, 4), (RemoteProtocolError, 4),
        (MigrationTimeout, 5), (MigrationCancelled, 5),
    ],
)  # fmt: skip
def test_status_of_each_error(kind, status, monkeypatch, capsys):
    from rdma_mig.cli import inspect
    from rdma_mig.cli.main import main

    def fail(_args):
        raise kind("what\nhappened", remedy="do\nthis", owner="it is the source's")

    monkeypatch.setattr(inspect, "run", fail)
    assert main(["inspect", "x"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "rdma-migrate: what happened; it is the source's; do this\n"


def test_interrupt_is_a_cancellation(monkeypatch, capsys):
    from rdma_mig.cli import inspect
    from rdma_mig.cli.main import main

    def interrupt(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupt)
    assert main(["inspect", "x"]) == 5
    assert capsys.readouterr().err == "rdma-migrate: interrupted\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["doctor"], "doctor"),
        (["trace", "show", "file"], "trace show"),
        (["clean", "dir"], "clean"),
    ],
)
def test_unknown_option_names_the_help_of_its_command(words, named):
    line = one_line(run(*words, "--nonsense"), 2)
    assert line.endswith(f"unrecognized arguments: --nonsense; see rdma-migrate {named} --help")
