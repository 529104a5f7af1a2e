# SPDX-License-Identifier: Apache-2.0
"""A signal ends a wait whenever it comes."""

import os
import signal
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
