# SPDX-License-Identifier: Apache-2.0
"""A signal ends a wait whenever it comes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rdma_mig.cli.signals import cancelled_by_signals
from rdma_mig.waits import Cancel


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_that_does_not_interrupt_the_wait_ends_it(number):
    """As one that comes just before the wait: here another thread takes it."""
    with Cancel() as cancel, cancelled_by_signals(cancel.request):
        sender = threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), number))
        sender.start()
        began = time.monotonic()
        assert cancel.wait(10)
        assert time.monotonic() - began < 2
        sender.join()


def test_what_was_before_is_back_behind_it():
    def ours(_number, _frame):
        """Take it."""

    before = [signal.signal(number, ours) for number in (signal.SIGINT, signal.SIGTERM)]
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    try:
        with Cancel() as cancel, cancelled_by_signals(cancel.request):
            pass
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is ours
        assert signal.set_wakeup_fd(-1) == -1
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) == descriptors
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


# ---- while it starts, and when it has ended ----

# Sends itself a signal when it is about to import the Nth module.
AT_IMPORT = """
import os, sys
where, number = map(int, sys.argv[1:3])
del sys.argv[1:3]
from rdma_mig.cli import entry
count = 0

def watch(event, _arguments):
    global count
    if event == "import":
        count += 1
        if count == where:
            os.kill(os.getpid(), number)

sys.addaudithook(watch)
try:
    sys.exit(entry.command())
finally:
    os.write(1, b"%d imports" % count)
"""


def started(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AT_IMPORT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_it_starts_is_one_line(tmp_path, number):
    command = ["clean", tmp_path / "vm"]
    whole = started(0, int(number), *command)
    assert whole.returncode == 0, whole.stderr
    imports = int(whole.stdout.rpartition("\n")[2].split()[0])
    assert imports > 30
    for where in [1, 2, 3, *range(4, imports, imports // 12)]:
        ended = started(where, int(number), *command)
        assert (ended.returncode, ended.stderr) == (5, "rdma-migrate: interrupted\n"), where


@pytest.mark.parametrize("status", [0, 2])
@pytest.mark.parametrize("warned", [False, True])
def test_end_of_the_command_is_that_of_the_process(status, warned, tmp_path):
    code = (
        "import atexit, sys\nfrom rdma_mig.cli import entry\natexit.register(print, 'at exit')\n"
        "code = entry.run()\nprint('behind')\nsys.exit(code)"
    )
    command = ["clean", str(tmp_path / "vm")] if status == 0 else ["clean", "--no-such-option"]
    ended = subprocess.run(
        [sys.executable, *(["-W", "default"] if warned else []), "-c", code, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == status
    assert ended.stdout.endswith("behind\nat exit\n" if warned else "at exit\n")
    assert ("behind" in ended.stdout) is warned


@pytest.mark.parametrize("status", [0, 2])
def test_signal_behind_its_end_changes_nothing(status, tmp_path):
    code = (
        "import os, sys\nfrom rdma_mig.cli import entry\ntry:\n    status = entry.command()\n"
        "except SystemExit as end:\n    status = end.code\n"
        f"os.kill(os.getpid(), {int(signal.SIGINT)})\nprint('never')"
    )
    command = ["clean", str(tmp_path / "vm")] if status == 0 else ["clean", "--no-such-option"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == status
    assert "never" not in ended.stdout
    assert ("nothing" in ended.stdout) == (status == 0)
    assert "Traceback" not in ended.stderr
