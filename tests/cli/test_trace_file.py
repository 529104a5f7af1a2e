# SPDX-License-Identifier: Apache-2.0
"""The file of --trace: whole up to the last event after SIGKILL, and for its owner only."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rdma_mig.errors import UsageError
from rdma_mig.trace.reading import TraceFileError, read_trace
from rdma_mig.tracing import Trace
from rdma_mig.wire.trace import TraceRecord

STEP = 65536  # by which the file grows


def records(path):
    return [numbered.record for numbered in read_trace(path)]


def run(script, *arguments):
    """Run Python with this script; return how it ended, and what it has said."""
    done = subprocess.run(
        [sys.executable, "-c", "from rdma_mig.tracing import Trace\n" + textwrap.dedent(script),
         *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout.strip() or done.stderr


def test_killed_process_has_written_every_event(tmp_path):
    path = tmp_path / "trace"
    pid = os.fork()
    if pid == 0:
        trace = Trace(path, "incoming")
        for number in range(100):
            trace.record("round", number=number, last=False)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    found = records(path)
    assert [record.kind for record in found] == ["begin"] + ["round"] * 100
    assert found[-1].fields["number"] == 99
    assert [record.t for record in found] == sorted(record.t for record in found)
    # Nobody could cut off what the file has behind its content.
    assert path.stat().st_size == STEP
    assert not path.read_bytes().rpartition(b"\n")[2].strip(b"\0")


@pytest.mark.parametrize("at", [1, 20, -1], ids=["one byte", "some bytes", "all but the first"])
def test_record_that_was_being_written_is_none_yet(tmp_path, at):
    path = tmp_path / "trace"
    with Trace(path, "incoming"):
        pass
    line = TraceRecord(1, "round", {"number": 1, "last": True}).encode()
    with path.open("ab") as file:
        file.write(b"\0" + line[1:][:at] + bytes(STEP))
    assert [record.kind for record in records(path)] == ["begin"]
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(TraceFileError, match=r"record 2 is (none|longer)"):
        records(path)


def test_a_record_needs_no_system_call(tmp_path):
    """But one at times, when the file grows; elsewhere (a FIFO) it is one write each."""

    def written():
        return int(re.search(r"syscw: (\d+)", Path("/proc/thread-self/io").read_text())[1])

    counted = {}
    for path in (tmp_path / "trace", "/dev/null"):
        with Trace(path, "incoming") as trace:
            before = written()
            for number in range(2000):
                trace.record("round", number=number, last=False)
            counted[path] = written() - before
    assert list(counted.values()) == [0, 2000]
    assert len(records(tmp_path / "trace")) == 2001


def test_trace_is_followed_while_it_is_written(tmp_path):
    path = tmp_path / "trace"
    command = Path(sys.executable).with_name("rdma-migrate")
    # More than the file grows by at once, three times over.
    count = 3 * STEP // len('{"t": 0.123456, "kind": "round", "number": 1000, "last": false}')
    with Trace(path, "outgoing") as trace:
        shown = subprocess.Popen(
            [command, "trace", "show", "--follow", path], stdout=subprocess.PIPE, text=True
        )
        with shown:
            assert "since last" in shown.stdout.readline()
            assert "outgoing" in shown.stdout.readline()
            for number in range(count):
                trace.record("round", number=number, last=False)
                if number % 500 == 0:
                    assert f"round {number}" in shown.stdout.readline()
                    continue
                if number % 500 == 499:
                    lines = [shown.stdout.readline() for _ in range(499)]
                    assert f"round {number}" in lines[-1]
            assert shown.poll() is None
            trace.record("end", status="completed", message="")
            assert "completed" in shown.stdout.read()
            assert shown.wait(30) == 0


def test_file_ends_with_its_content_once_it_is_closed(tmp_path):
    path = tmp_path / "trace"
    with Trace(path, "incoming") as trace:
        while path.stat().st_size < 4 * STEP:
            trace.record("end", status="failed", message="x" * 400)
        assert path.stat().st_size % 4096 == 0
    content = path.read_bytes()
    assert content.endswith(b"}\n")
    assert b"\0" not in content
    assert len(records(path)) == content.count(b"\n") > 3 * STEP // 500


def test_child_that_was_forked_does_not_cut_the_file_off(tmp_path):
    with Trace(tmp_path / "trace", "incoming") as trace:
        pid = os.fork()
        if pid == 0:
            trace.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        trace.record("round", number=1, last=False)
        assert trace.failure == ""
    assert len(records(tmp_path / "trace")) == 2


def test_file_that_somebody_shortens_ends_the_trace_and_nothing_else(tmp_path):
    status, said = run(
        """
        import faulthandler, os, sys
        faulthandler.enable()
        with Trace(sys.argv[1], "incoming") as trace:
            os.truncate(sys.argv[1], 0)
            for number in range(3):
                trace.record("round", number=number, last=False)
            print(trace.failure)
        """,
        tmp_path / "trace",
    )
    assert (status, said) == (0, "somebody else shortened the file, or there is no room for it")


def test_other_mapping_that_loses_its_pages_is_not_ours_to_mend(tmp_path):
    script = """
        import mmap, os, sys
        with Trace(sys.argv[1], "incoming") as trace:
            with open(sys.argv[2], "w+b") as file:
                file.truncate(8192)
                other = mmap.mmap(file.fileno(), 8192)
                file.truncate(0)
                other[4096]
        """
    status, _ = run(script, tmp_path / "trace", tmp_path / "other")
    assert status == -signal.SIGBUS


def test_file_that_finds_no_more_room_ends_the_trace_and_nothing_else(tmp_path):
    status, said = run(
        """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
        with Trace(sys.argv[1], "incoming") as trace:
            for number in range(10000):
                trace.record("round", number=number, last=False)
            print(trace.failure)
        """,
        tmp_path / "trace",
    )
    assert (status, said) == (0, "File too large")
    assert len(records(tmp_path / "trace")) > 1000
    assert b"\0" not in (tmp_path / "trace").read_bytes()


def test_file_is_for_its_owner_and_begun_anew(tmp_path):
    path = tmp_path / "trace"
    path.write_text("of an earlier run\n")
    path.chmod(0o644)
    before = os.umask(0)
    try:
        with Trace(path, "outgoing"), Trace(tmp_path / "new", "outgoing"):
            pass
    finally:
        os.umask(before)
    assert [record.fields["role"] for record in records(path)] == ["outgoing"]
    assert path.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be written to .*: Is a directory"):
        Trace(tmp_path, "incoming")


def test_full_disk_ends_the_trace_and_nothing_else():
    with Trace("/dev/full", "incoming") as trace:
        assert trace.failure == "No space left on device"
        trace.record("round", number=1, last=False)


def test_reader_that_is_gone_or_does_not_read_holds_nobody_up(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match="No such device"):
        Trace(fifo, "incoming")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with Trace(fifo, "incoming") as trace:
            for _ in range(10000):
                trace.record("end", status="failed", message="x" * 100)
            assert "temporarily unavailable" in trace.failure
    finally:
        os.close(reader)


def test_records_of_several_threads_are_whole_lines(tmp_path):
    with Trace(tmp_path / "trace", "incoming") as trace:

        def work():
            for number in range(500):
                trace.record("round", number=number, last=False)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(records(tmp_path / "trace")) == 2001


def test_long_waits_are_told(tmp_path, monkeypatch):
    from rdma_mig import tracing

    now = 100.0
    monkeypatch.setattr(tracing.time, "monotonic", lambda: now)
    with Trace(tmp_path / "trace", "incoming") as trace:
        trace.waited("a short one", 99.95, 100.0)
        trace.waited("a long one", 97.0, 100.0)
    (wait,) = [record for record in records(tmp_path / "trace") if record.kind == "wait"]
    assert wait.fields == {"awaited": "a long one", "seconds": 3.0}
