# SPDX-License-Identifier: Apache-2.0
"""rdma-migrate that stops (SIGSTOP) at one place, for a test to kill it there.

    stopping.py MATCH rdma-migrate incoming ... --trace FILE

MATCH is a JSON object: `kind` and fields of a record of the trace, right behind which it stops; or
`before`, a function as `module:name`, whose first call it stops before. Nothing else is changed.
"""

import importlib
import json
import signal
import sys
import threading
from typing import Any


def stop() -> None:
    # To this thread: not one instruction of it follows.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def stop_before(where: str) -> None:
    module, _, name = where.partition(":")
    place: Any = importlib.import_module(module)
    *outer, name = name.split(".")
    for each in outer:
        place = getattr(place, each)
    call = getattr(place, name)

    def stopping(*arguments: Any, **more: Any) -> Any:
        stop()
        return call(*arguments, **more)

    setattr(place, name, stopping)


def main() -> int:
    from rdma_mig.cli.main import main as rdma_migrate
    from rdma_mig.tracing import Trace

    wanted = json.loads(sys.argv[1])
    if "before" in wanted:
        stop_before(wanted["before"])
    record = Trace.record

    def stop_behind(self: Trace, kind: str, **fields: object) -> None:
        record(self, kind, **fields)
        if wanted.items() <= (fields | {"kind": kind}).items():
            stop()

    Trace.record = stop_behind  # type: ignore[method-assign]
    return rdma_migrate(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
