# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate`` as it is, whose events also say when they came and what was used up to then.

    command.py incoming|outgoing ARGUMENTS... --json

Each event gains ``at`` (seconds of the epoch, as QEMU's own events have it), ``user`` and
``system`` (CPU seconds so far), ``peak`` (bytes resident at most) and ``pinned`` (bytes pinned
now). Two events are added, which people do not need: ``connecting``, right before the CM request,
and ``streamed``, when the last byte of the stream was consumed.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from rdma_mig.cli import reporting
from rdma_mig.cli.main import main
from rdma_mig.migration.receive import SnapshotDestination
from rdma_mig.transport import outgoing


def memory() -> dict[str, int]:
    """Return the bytes that were resident at most, and those that are pinned.

    As the kernel accounts them; ru_maxrss begins with the parent's.
    """
    with open("/proc/self/status", encoding="ascii") as status:
        found = dict(line.split(":", 1) for line in status)
    return {
        name: int(found[key].split()[0]) << 10
        for name, key in (("peak", "VmHWM"), ("pinned", "VmPin"))
    }


def stamped(event: dict[str, Any]) -> str:
    """Return the event as a line, with what was used up to now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    more = {
        "at": time.time(),
        "user": used.ru_utime,
        "system": used.ru_stime,
    }
    return json.dumps(event | more | memory())


def print_json(_reporter: reporting.Reporter, event: dict[str, Any]) -> None:
    print(stamped(event), flush=True)


def announced(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Print an event each time before a function is called."""

    @functools.wraps(call)
    def first(*arguments: Any, **named: Any) -> Any:
        print(stamped({"event": name}), flush=True)
        return call(*arguments, **named)

    return first


reporting.Reporter._print_json = print_json  # type: ignore[method-assign]
outgoing.connect = announced("connecting", outgoing.connect)
SnapshotDestination._keep = announced("streamed", SnapshotDestination._keep)  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
