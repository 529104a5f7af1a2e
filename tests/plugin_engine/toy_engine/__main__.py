# SPDX-License-Identifier: Apache-2.0
"""One end of a migration of the toy machine by the toy engine.

    python -m toy_engine incoming|refusing|outgoing URI [OPTIONS AS JSON]

Says in a line of JSON each where it listens, and what its machine is afterwards.
"""

import json
import sys
import time

from rdma_mig.plugin import Migration, MigrationError
from toy_engine.engine import receive, send
from toy_engine.machine import ToyMachine


def main():
    role, uri, *options = sys.argv[1:]
    options = json.loads(options[0]) if options else {}
    what = {"paint": role == "outgoing", "refuses": role == "refusing"}
    error = None
    with ToyMachine(**what) as machine, Migration() as migration:
        try:
            if role == "outgoing":
                machine.resume()
                send(machine, uri, migration, **options)
            else:
                tell(uri=receive(machine, uri, migration, **options))
            assert migration.wait(120), "it does not end"
        except MigrationError as failure:
            error = str(failure)
        now = {"counter": machine.counter, "digests": machine.digests()}
        time.sleep(0.2)
        tell(
            **(machine.arrived or now),
            runs=machine.counter > now["counter"],
            error=error,
            pages=migration.state.counters.normal_pages,
        )


def tell(**what):
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
