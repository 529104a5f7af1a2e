# SPDX-License-Identifier: Apache-2.0
"""rdma-migrate that stops (SIGSTOP) right behind one record of its trace, for a test to kill it.

    stopping.py MATCH rdma-migrate incoming ... --trace FILE

MATCH is a JSON object: `kind` and fields that the record has to have. Nothing else is changed.
"""

import json
import signal
import sys
import threading


def main() -> int:
    from rdma_mig.cli.main import main as rdma_migrate
    from rdma_mig.tracing import Trace

    wanted = json.loads(sys.argv[1])
    record = Trace.record

    def stop_behind(self: Trace, kind: str, **fields: object) -> None:
        record(self, kind, **fields)
        if wanted.items() <= (fields | {"kind": kind}).items():
            # To this thread: not one instruction of it follows.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    Trace.record = stop_behind  # type: ignore[method-assign]
    return rdma_migrate(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
