# SPDX-License-Identifier: Apache-2.0
"""Two soft-RoCE devices of this host with a wire between them that can be cut.

Packets between two addresses of one host never leave it, so a link that goes down, or a queueing
discipline that drops packets, would not be noticed. Here each of the two addresses is local only
for what arrives over its own interface, and all else reaches it over the other one: a pair of veth
devices is the wire. It works within one network namespace, which is all that soft-RoCE knows, and
touches nothing but its own interfaces, addresses and routes. Needs root.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

_NAMES = ("rmigw0", "rmigw1")
_ADDRESSES = ("10.99.8.1", "10.99.8.2")
_TABLES = ("9980", "9981")
_LIMIT = 120  # seconds for a command, on the slowest host

# Removes what was made when the process has ended that holds the other end of the pipe. Not before:
# librdmacm keeps each device open that it has used, and the kernel waits for that.
_UNDO = "read -r _; " + "".join(
    f"rdma link del {name}; ip rule del iif {name}; ip route flush table {table}; "
    for name, table in zip(_NAMES, _TABLES, strict=True)
)


def _run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, check=check, capture_output=True, text=True, timeout=_LIMIT)
    return done.stdout


class Wire:
    """The two ends, 0 and 1, and what happens to the wire.

    Attributes:
        devices: names of the verbs devices.
        addresses: their IPv4 addresses.
    """

    devices = _NAMES
    addresses = _ADDRESSES

    def __init__(self) -> None:
        for module in ("rdma_rxe", "sch_netem", "sch_prio", "cls_u32"):
            # Built in, it is no module; where it is neither, what needs it says so.
            _run("modprobe", module, check=False)
        self._undoing = subprocess.Popen(
            ["sh", "-c", f"{_UNDO} ip link del {_NAMES[0]}"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        _run("ip", "link", "add", _NAMES[0], "mtu", "9000",
             "type", "veth", "peer", "name", _NAMES[1], "mtu", "9000")  # fmt: skip
        for end, name in enumerate(_NAMES):
            _run("ip", "addr", "add", f"{_ADDRESSES[end]}/24", "dev", name)
            _run("ip", "link", "set", name, "up")
            _run("ip", "rule", "add", "iif", name, "lookup", _TABLES[end])
        self._lead()
        for name in _NAMES:
            _run("rdma", "link", "add", name, "type", "rxe", "netdev", name)

    def _lead(self) -> None:
        """Lead packets over the wire; again after an interface was down, which undoes it."""
        for end, name in enumerate(_NAMES):
            # As it was at first: only a local address can be made the source of a route.
            _run("ip", "route", "replace", "local", _ADDRESSES[end], "dev", name,
                 "table", "local", "scope", "host", "proto", "kernel")  # fmt: skip
        for end, name in enumerate(_NAMES):
            other = _NAMES[1 - end]
            _run("ip", "route", "replace", f"{_ADDRESSES[1 - end]}/32", "dev", name,
                 "src", _ADDRESSES[end])  # fmt: skip
            _run("ip", "route", "replace", "local", _ADDRESSES[end], "dev", name,
                 "table", _TABLES[end])  # fmt: skip
            _run("ip", "neigh", "replace", _ADDRESSES[end], "nud", "permanent", "dev", other,
                 "lladdr", Path(f"/sys/class/net/{name}/address").read_text().strip())  # fmt: skip
        for end, name in enumerate(_NAMES):
            _run("ip", "route", "del", "local", _ADDRESSES[end], "dev", name, "table", "local",
                 check=False)  # fmt: skip

    def drop(self, end: int) -> None:
        """Lose every packet that this end sends, as a switch would: no link goes down."""
        _run("tc", "qdisc", "add", "dev", _NAMES[end], "root", "netem", "loss", "100%")

    def reorder(self, end: int, queue_pair: int) -> None:
        """Let what this end sends to one queue pair lag by 2 ms; one packet in a thousand does not.

        That one overtakes those before it. soft-RoCE gives up a connection when five such packets
        come with no acknowledgement between them, and gives that for 64 packets at a time.
        It is found by its number in the packet: 24 bits of the transport header behind IPv4 and UDP
        (InfiniBand specification, 9.2; annex A17).
        """
        name, band = _NAMES[end], "1:3"
        _run("tc", "qdisc", "add", "dev", name, "root", "handle", "1:",
             "prio", "priomap", *["0"] * 16)  # fmt: skip
        _run("tc", "qdisc", "add", "dev", name, "parent", band, "netem", "limit", "100000",
             "delay", "2ms", "reorder", "0.1%")  # fmt: skip
        _run("tc", "filter", "add", "dev", name, "parent", "1:", "protocol", "ip", "u32",
             "match", "u32", f"{queue_pair:#x}", "0xffffff", "at", "32",
             "flowid", band)  # fmt: skip

    def reordered(self, end: int) -> int:
        """Packets that went the way of those that overtake each other."""
        shown = json.loads(_run("tc", "-s", "-j", "qdisc", "show", "dev", _NAMES[end]))
        return next(int(entry["packets"]) for entry in shown if entry["kind"] == "netem")

    def unplug(self, end: int) -> None:
        """Set this end's link down; the other end's loses its carrier."""
        _run("ip", "link", "set", _NAMES[end], "down")

    def mend(self) -> None:
        """Undo drop() and unplug()."""
        for name in _NAMES:
            _run("tc", "qdisc", "del", "dev", name, "root", check=False)
            _run("ip", "link", "set", name, "up")
        self._lead()

    def sent(self, end: int) -> int:
        """Packets that this end has sent."""
        return int(Path(f"/sys/class/net/{_NAMES[end]}/statistics/tx_packets").read_text())

    def states(self) -> list[str]:
        """What the kernel says of both ports: ACTIVE, DOWN."""
        shown: list[dict[str, Any]] = json.loads(_run("rdma", "-j", "link"))
        found = {entry["ifname"]: entry["state"] for entry in shown}
        return [found[name] for name in _NAMES]


class WireProcess:
    """A wire that a process of its own holds, and that is gone when this is left."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.wire"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        self._answer("to be laid")

    def _answer(self, what: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "done\n":
            self._process.kill()
            raise AssertionError(f"the wire was {what}, and was not: see standard error")

    def do(self, what: str, *end: int) -> None:
        """Call drop, unplug or mend."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join([what, *map(str, end)]) + "\n")
        self._process.stdin.flush()
        self._answer(f"told to {what}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_LIMIT)
        wait_until_gone()


def wait_until_gone() -> None:
    """Wait until the devices of a wire are gone, after the process that laid it has ended."""
    end = time.monotonic() + _LIMIT
    while any(Path("/sys/class/infiniband", name).exists() for name in _NAMES) or (
        Path("/sys/class/net", _NAMES[0]).exists()
    ):
        assert time.monotonic() < end, "the wire's devices do not go"
        time.sleep(0.05)


def _serve() -> None:
    wire = Wire()
    print("done", flush=True)
    for line in sys.stdin:
        what, *end = line.split()
        getattr(wire, what)(*map(int, end))
        print("done", flush=True)


if __name__ == "__main__":
    _serve()
