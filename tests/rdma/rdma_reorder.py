# SPDX-License-Identifier: Apache-2.0
"""A guest that writes, over four connections of which one's packets overtake each other.

    rdma_reorder.py pin-all|dynamic

A process of its own: librdmacm keeps a device open that it has used, and the kernel does not let go
of it before.
"""

import json
import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), *(str(_TESTS / room) for room in ("rdma", "migration", "snapshot"))]

import rdma_kit as kit  # noqa: E402
from harness.wire import Wire  # noqa: E402
from live_kit import Destination, check_arrival, guest_of, start_to  # noqa: E402

from rdma_mig.migration.rdma import RdmaOptions  # noqa: E402
from rdma_mig.transport import outgoing, side_connections  # noqa: E402
from rdma_mig.verbs.endpoint import Endpoint  # noqa: E402

_COUNT = 4


def peers_number(endpoint: Endpoint) -> int:
    """Return the number of the queue pair at the other end."""
    shown = subprocess.run(
        ["rdma", "-j", "resource", "show", "qp"], capture_output=True, check=True, timeout=60
    ).stdout
    return next(
        int(entry["rqpn"]) for entry in json.loads(shown)
        if entry["ifname"] == endpoint.device and entry["lqpn"] == endpoint.qp_number
    )  # fmt: skip


def main(mode: str) -> None:
    wire = Wire()
    open_all = side_connections.open_side_connections
    opened: list[Endpoint] = []

    def disturb(*arguments: object) -> list[Endpoint]:
        opened.extend(open_all(*arguments))
        wire.reorder(0, peers_number(opened[1]))
        return opened

    outgoing.open_side_connections = disturb
    with Destination(f"rdma:{wire.addresses[1]}:0", 64) as destination, guest_of(64) as guest:
        guest.begin()
        state = start_to(
            destination.uri,
            guest,
            options=RdmaOptions(pin_all=mode == "pin-all", connections=_COUNT),
            bandwidth_limit=int((64 << 20) / kit.patience(1)),
            max_downtime=int(4e8 * kit.patience(1)),
        )
        check_arrival(state, guest, destination)
    print(json.dumps({"reordered": wire.reordered(0), "connections": 1 + len(opened)}))


main(sys.argv[1])
