# SPDX-License-Identifier: Apache-2.0
"""A machine of two RAM blocks and a thread that writes one of them: the guest ``toy``."""

import hashlib
import struct
import threading

from rdma_mig import plugin as rm

PAGE, MIB = 4096, 1 << 20
STATE = "toy-counter"


class ToyMachine:
    """Counts in its memory, page after page; its only register is the counter.

    Args:
        paint: fill it as a machine that has run for a while.
        refuses: take no device state, as a machine that lacks a device.
    """

    api_version = 1
    machine = "toy-1.0"

    def __init__(self, paint=False, refuses=False):
        self.ram = rm.GuestRam([rm.RamBlock("toy.ram", 8 * MIB), rm.RamBlock("toy.rom", 3 * PAGE)])
        self.tracker = rm.ExplicitMarks(self.ram)
        self.counter = 0
        self.refuses = refuses
        self.arrived = None
        self._running, self._quit = threading.Event(), threading.Event()
        self._gate = threading.Lock()
        self._pause = 0.001
        self._thread = threading.Thread(target=self._run)
        if paint:
            for block, what in zip(self.ram, (b"toy!", b"rom."), strict=True):
                with block.memory.view() as view:
                    view[PAGE : len(view) // 2] = what * ((len(view) // 2 - PAGE) // 4)
        self._thread.start()

    def _run(self):
        while not self._quit.wait(self._pause):
            with self._gate:
                if self._running.is_set():
                    self._step()

    def _step(self):
        with self.ram[0].memory.view() as view:
            for _ in range(32):
                self.counter += 1
                page = self.counter * 7 % 300
                struct.pack_into("<Q", view, page * PAGE + 8, self.counter)
                self.tracker.mark(0, page)

    def stop(self):
        with self._gate:
            if self._running.is_set():
                self._step()  # a machine ends what it is at before it rests
            self._running.clear()

    def resume(self):
        self._running.set()

    def throttle(self, percentage):
        self._pause = 0.001 / (1 - percentage / 100)

    def save_device_state(self):
        return rm.encode_sole_device(STATE, self.counter.to_bytes(8, "big"), section_id=3)

    def prepare(self, head, start):
        theirs = [(block.idstr, block.length) for block in start.blocks]
        ours = [(block.block.idstr, block.block.length) for block in self.ram]
        if (head.machine, theirs) != (self.machine, ours):
            raise rm.RemoteProtocolError(f"a {head.machine!r} came, this is a {self.machine!r}")
        return self.ram

    def load_device_state(self, state):
        if self.refuses:
            raise rm.RemoteProtocolError("this machine has no such counter")
        self.counter = int.from_bytes(rm.decode_sole_device(state, STATE), "big")
        self.arrived = {"counter": self.counter, "digests": self.digests()}

    def digests(self):
        """Of each RAM block as it is now."""
        found = []
        for block in self.ram:
            with block.memory.view() as view:
                found.append(hashlib.sha256(view).hexdigest())
        return found

    def close(self):
        self._quit.set()
        self._thread.join()
        self.ram.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
