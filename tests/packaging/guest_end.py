# SPDX-License-Identifier: Apache-2.0
"""One end of a migration of any installed guest, by this project's engine.

    guest_end.py incoming|outgoing GUEST URI OPTIONS-AS-JSON [PATH]

GUEST is the name of an entry point; PATH is the snapshot's, if it is that. Tells in a line of JSON
each where it listens, and which parts of the interface were used and what RAM was at the stop.
"""

import hashlib
import json
import struct
import sys
import threading
import time

from rdma_mig import plugin

PAGE, MIB = 4096, 1 << 20
CALLS = ("stop", "resume", "prepare", "save_device_state", "load_device_state")


class Marks(plugin.ExplicitMarks):
    """Counts the pages that were harvested."""

    found = 0

    def harvest(self, index, into):
        found = super().harvest(index, into)
        self.found += found
        return found


class Counting(plugin.find_guest("process")):
    """A process that counts in its memory."""

    def __init__(self, *, paint):
        blocks = [plugin.RamBlock("first", 16 * MIB), plugin.RamBlock("second", 5 * PAGE)]
        super().__init__("counting-1.0", blocks)
        self.tracker = Marks(self.ram)
        self.counter = 0
        self._running, self._quit, self._gate = (
            threading.Event(),
            threading.Event(),
            threading.Lock(),
        )
        if paint:
            with self.ram[0].memory.view() as view:
                view[MIB : 6 * MIB] = b"data" * (5 * MIB // 4)
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def _count(self):
        while not self._quit.wait(0.0005):
            with self._gate, self.ram[0].memory.view() as view:
                for _ in range(32 if self._running.is_set() else 0):
                    self.counter += 1
                    page = self.counter % 200
                    struct.pack_into("<Q", view, page * PAGE, self.counter)
                    self.tracker.mark(0, page)

    def stop(self):
        self._running.clear()
        with self._gate:
            pass

    def resume(self):
        self._running.set()

    def save_state(self):
        return self.counter.to_bytes(8, "big")

    def load_state(self, state):
        self.counter = int.from_bytes(state, "big")

    def close(self):
        self._quit.set()
        self._thread.join()
        super().close()


def watched(kind, calls):
    """A class of guests that notes what is called, and what RAM is when it may not change."""

    def noting(name):
        def call(self, *arguments):
            value = getattr(kind, name)(self, *arguments)
            calls.append(name)
            if name in ("save_device_state", "load_device_state"):
                self.at_stop = {"digests": digests(self.ram), "counter": self.counter}
            return value

        return call

    notes = {name: noting(name) for name in CALLS}
    return type("Watched", (kind,), {"counter": 0, **notes})


def digests(ram):
    found = []
    for block in ram:
        with block.memory.view() as view:
            found.append(hashlib.sha256(view).hexdigest())
    return found


def main():
    role, name, uri, options, *path = sys.argv[1:]
    options = json.loads(options)
    calls = []
    kind = watched(Counting if name == "process" else plugin.find_guest(name), calls)
    guest = kind(*path) if name == "snapshot" else kind(paint=role == "outgoing")
    with guest, plugin.Migration() as migration:
        transport = plugin.find_transport(uri.partition(":")[0])
        if role == "incoming":
            process = plugin.LiveDestination(guest).process
            tell(uri=transport.start_incoming(uri, migration=migration, process=process, **options))
        else:
            guest.resume()
            time.sleep(0.05)
            calls.clear()
            save = plugin.LiveSource(guest).save
            transport.start_outgoing(uri, migration=migration, ram=guest.ram, save=save, **options)
        assert migration.wait(120), "it does not end"
        now = guest.counter
        time.sleep(0.2)
        tell(
            **guest.at_stop,
            calls=calls,
            machine=guest.machine,
            found=getattr(guest.tracker, "found", 0),
            runs=guest.counter > now,
        )


def tell(**what):
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
