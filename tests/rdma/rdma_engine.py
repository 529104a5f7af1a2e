# SPDX-License-Identifier: Apache-2.0
"""A destination with an engine of its own, in a process of its own.

    rdma_engine.py HOST COUNT

For each of COUNT migrations it prints ``{"uri": ...}``, loads RAM through the hooks, and prints
what came: a digest of each block, or the error. At the end it prints what it still has open, and
stays until its standard input ends.
"""

import gc
import hashlib
import json
import os
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]


def main() -> None:
    from rdma_mig.errors import MigrationError, PeerGone
    from rdma_mig.memory.blocks import RamBlock
    from rdma_mig.memory.ram import GuestRam
    from rdma_mig.migration import ram_control
    from rdma_mig.migration.rdma import rdma_start_incoming_migration
    from rdma_mig.migration.state import Migration
    from rdma_mig.wire.stream import Hook, RamStart, StreamParser

    host, count = sys.argv[1], int(sys.argv[2])

    def process(migration, file, transport):
        """Load RAM; the end of the connection is the end of the stream."""
        parser = StreamParser()
        ram = None
        hooks = 0
        try:
            while not parser.in_device_state:
                event = parser.next_event()
                if event is None:
                    parser.feed(file.get())
                elif isinstance(event, RamStart):
                    ram = GuestRam([RamBlock(b.idstr, b.length) for b in event.blocks])
                    for guest in ram:
                        ram_control.ram_control_load_hook(
                            file, ram_control.RAM_CONTROL_BLOCK_REG, guest.block.idstr
                        )
                    transport.attach(ram)
                elif isinstance(event, Hook):
                    ram_control.ram_control_load_hook(file, ram_control.RAM_CONTROL_HOOK)
                    hooks += 1
            transport.withdraw_keys()
            digests = []
            for guest in ram:
                with guest.memory.view() as view:
                    digests.append(hashlib.sha256(view).hexdigest())
            tell(digests=digests, hooks=hooks, stream=file.position)
            try:
                file.get()
            except PeerGone:
                return
        finally:
            transport.close()
            if ram is not None:
                ram.close()

    before = descriptors()
    for number in range(count):
        with Migration() as migration:
            uri = rdma_start_incoming_migration(
                f"rdma:{host}:0", migration=migration, process=process
            )
            tell(uri=str(uri))
            try:
                migration.wait()
            except MigrationError as error:
                tell(error=str(error), status=int(error.exit_status))
        if number == 0:
            before = max(before, descriptors())  # what the libraries open once and keep
    gc.collect()
    tell(left=descriptors() - before)
    sys.stdin.read()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def tell(**what) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
