# SPDX-License-Identifier: Apache-2.0
"""The file of --trace: whole up to the last event after SIGKILL, and for its owner only."""

import os
import signal
import threading

import pytest

from rdma_mig.errors import UsageError
from rdma_mig.tracing import Trace
from rdma_mig.wire.trace import TraceRecord


def records(path):
    return [TraceRecord.decode(line) for line in path.read_bytes().splitlines(keepends=True)]


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
        trace.waited("a short one", 99.95)
        trace.waited("a long one", 97.0)
    (wait,) = [record for record in records(tmp_path / "trace") if record.kind == "wait"]
    assert wait.fields == {"awaited": "a long one", "seconds": 3.0}
