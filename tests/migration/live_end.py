# SPDX-License-Identifier: Apache-2.0
"""The destination of a live migration, in a process of its own.

    live_end.py URI MIB

It owns MIB of memory and says ``{"uri": ...}``. When a guest has come it says what its RAM is
before the guest goes on, and then what the guest has done here.
"""

import json
import sys
import time
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "migration")]


def main() -> None:
    from live_kit import MIB, WritingGuest

    import rdma_mig.migration as header
    from rdma_mig.errors import MigrationError
    from rdma_mig.memory import RamBlock

    class Arriving(WritingGuest):
        def resume(self) -> None:
            resumed_at = time.monotonic()
            tell(resumed_at=resumed_at, digests=self.digests(), written=self.written)
            super().resume()
            self.begin()

    uri, size = sys.argv[1], int(sys.argv[2]) * MIB
    with Arriving((RamBlock("live.ram", size),)) as guest:
        header.migrate_set_guest(guest)
        tell(uri=str(header.qemu_start_incoming_migration(uri)))
        try:
            header.migrate_get_current().migration.wait()
        except MigrationError as error:
            tell(error=str(error), resumed="resume" in guest.calls)
            return
        came = guest.written
        while guest.written < came + 1000:
            time.sleep(0.01)
        tell(info=header.do_info_migrate(), goes_on=True)


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
