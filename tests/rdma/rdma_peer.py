# SPDX-License-Identifier: Apache-2.0
"""A raw peer in a process of its own, to be killed, stopped or let go.

    rdma_peer.py source URI STEP        connect, and behave well up to STEP
    rdma_peer.py destination HOST STEP  listen, print the URI, accept, behave well up to STEP

It prints the step when it has come that far, and stays until its standard input ends.
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "rdma"), str(_TESTS / "snapshot")]


def main() -> None:
    import rdma_kit as kit

    if sys.argv[1] == "source":
        with kit.dial(sys.argv[2]) as peer:
            stay(kit.act_as_source(peer), sys.argv[3])
    else:
        with kit.RawListener(host=sys.argv[2]) as listener:
            print(listener.uri, flush=True)
            stay(kit.act_as_destination(listener.accept(seconds=60)), sys.argv[3])


def stay(steps, step) -> None:
    import rdma_kit as kit

    kit.until(step, steps)
    print(step, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
