# SPDX-License-Identifier: Apache-2.0
"""One of our ends, a raw peer, and a wire between them that is cut; in a process of its own.

    rdma_cut.py ROLE STEP CUT WHOSE PATIENT

ROLE is ``incoming`` or ``outgoing``; STEP is one of the raw peer's (rdma_kit); CUT is ``drop`` or
``unplug``, at our end or the peer's (WHOSE: ``ours``, ``theirs``). PATIENT is ``patient`` for the
limits that a user has, ``eager`` for shorter ones. Prints what came of it, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]

import rdma_kit as kit  # noqa: E402
import snapshot_kit  # noqa: E402
from harness.wire import Wire  # noqa: E402

from rdma_mig.errors import MigrationError  # noqa: E402
from rdma_mig.verbs.endpoint import EndpointOptions  # noqa: E402

EAGER = EndpointOptions(probe_seconds=0.5, silence_seconds=2.0)


def main() -> None:
    role, step, cut, whose, patient = sys.argv[1:]
    options = EndpointOptions() if patient == "patient" else EAGER
    wire = Wire()
    # Who listens is at end 0.
    ours = 0 if role == "incoming" else 1

    def sever() -> None:
        getattr(wire, cut)(ours if whose == "ours" else 1 - ours)

    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        if role == "incoming":
            with (
                kit.incoming(room / "vm", host=wire.addresses[0], endpoint=options) as end,
                kit.dial(end.uri) as peer,
            ):
                kit.until(step, kit.act_as_source(peer))
                told = ended(end, sever)
            left = sorted(path.name for path in room.iterdir())
        else:
            with snapshot_kit.guest(kit.BLOCKS) as memories:
                kit.paint(memories)
                kept = snapshot_kit.keep(room / "kept", memories, kit.BLOCKS)
            with kit.RawListener(host=wire.addresses[0]) as listener:
                worker = kit.Worker(
                    lambda: kit.until(step, kit.act_as_destination(listener.accept(kit.PLAIN, 60)))
                )
                with kit.outgoing(kept, listener.uri, endpoint=options) as end:
                    worker.result()
                    told = ended(end, sever)
            left = sorted(path.name for path in room.iterdir() if path != kept)
        print(json.dumps({**told, "left": left}), flush=True)
        # So that what is torn down meets a peer.
        with contextlib.suppress(Exception):
            wire.mend()


def ended(end: kit.End, sever: object) -> dict[str, object]:
    assert callable(sever)
    sever()
    began = time.monotonic()
    try:
        end.migration.wait(60)
    except MigrationError as error:
        kit.check_line(error)
        return {
            "kind": type(error).__name__,
            "status": int(error.exit_status),
            "line": str(error),
            "seconds": time.monotonic() - began,
        }
    raise AssertionError("it neither failed nor ended")


if __name__ == "__main__":
    main()
