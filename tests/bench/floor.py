# SPDX-License-Identifier: Apache-2.0
"""What no migration can be faster than: populating, registering and writing as many bytes.

Two processes with one connection and no protocol on it. Run as a program, this is the end that is
written to.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rdma_mig.memory import GuestMemory
from rdma_mig.verbs.connector import connect
from rdma_mig.verbs.endpoint import Endpoint, EndpointOptions
from rdma_mig.verbs.listener import Listener
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, Deadline

MIB = 1 << 20
#: Bytes of one raw write: larger ones were not faster on soft-RoCE.
WRITE = 16 * MIB
_SECONDS = 600.0
_OPTIONS = EndpointOptions()
_HELLO = b"floor"


@dataclass(frozen=True, slots=True)
class FloorRound:
    """Seconds for a number of bytes: fresh memory at both ends at a time, and raw writes."""

    setup: float
    writes: float


class Memory:
    """Fresh memory, populated and registered; what a connection is measured with."""

    def __init__(self, endpoint: Endpoint, size: int, *, remote_write: bool) -> None:
        self._endpoint = endpoint
        self.memory = GuestMemory(size, "bench")
        self.memory.populate()
        self.region = endpoint.register(
            self.memory.address, size, what="bench", remote_write=remote_write, holder=None
        )

    def close(self) -> None:
        self._endpoint.deregister_all()
        self.memory.close()


class Floor:
    """The writing end; a context manager."""

    def __init__(self, address: str) -> None:
        self._verbs = load()
        self._cancel = Cancel()
        self._peer = subprocess.Popen(
            [sys.executable, __file__, address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._endpoint: Endpoint | None = None
        try:
            port = self._hear()["port"]
            self._endpoint = connect(address, port, _HELLO, self._cancel, _OPTIONS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        self._peer.kill()
        self._peer.communicate()
        self._cancel.close()

    @property
    def mtu(self) -> int | None:
        """Bytes that one packet carries at most; None on iWARP, where TCP decides."""
        assert self._endpoint is not None
        return self._endpoint.path[1]

    def _say(self, size: int) -> None:
        assert self._peer.stdin is not None
        print(size, file=self._peer.stdin, flush=True)

    def _hear(self) -> dict[str, Any]:
        assert self._peer.stdout is not None
        line = self._peer.stdout.readline()
        if not line:
            raise RuntimeError(f"the other end of the floor ended with {self._peer.wait()}")
        return dict(json.loads(line))

    def measure(self, size: int) -> FloorRound:
        """Populate and register so many bytes at both ends, and write them over."""
        assert self._endpoint is not None
        began = time.monotonic()
        self._say(size)
        ours = Memory(self._endpoint, size, remote_write=False)
        try:
            theirs = self._hear()
            setup = time.monotonic() - began
            writes = self._write(ours, theirs["address"], theirs["rkey"], size)
        finally:
            ours.close()
        self._say(0)
        self._hear()
        return FloorRound(setup, writes)

    def _write(self, ours: Memory, address: int, rkey: int, size: int) -> float:
        assert self._endpoint is not None
        queue = self._verbs.WriteQueue(
            self._endpoint.queue, chunk_size=MIB,
            max_write=min(WRITE, self._endpoint.max_message), interrupted=self._failed,
        )  # fmt: skip
        region = ours.region
        queue.set_targets([(region.address, region.lkey, address, rkey, size)])
        began = time.monotonic()
        queue.open()
        queue.save_runs(0, memoryview(bytearray(_pair(0, size))).cast("Q", [1, 2]))
        queue.close()
        self._endpoint.wait(self._verbs.WAIT_WRITES, "raw writes", Deadline.after(_SECONDS))
        return time.monotonic() - began

    def _failed(self, outcome: int) -> None:
        raise RuntimeError(f"a raw write met {outcome}")


def _pair(start: int, size: int) -> bytes:
    return start.to_bytes(8, sys.byteorder) + size.to_bytes(8, sys.byteorder)


def serve(address: str) -> None:
    """Be the end that is written to: a size a line, 0 to free it again; until the input ends."""
    with Cancel() as cancel:
        listener = Listener(address, 0, cancel, _OPTIONS)
        print(json.dumps({"port": listener.address[1]}), flush=True)
        endpoint = listener.accept(lambda _data, _peer: _HELLO, Deadline.after(60))
        memory: Memory | None = None
        try:
            for line in sys.stdin:
                size = int(line)
                if memory is not None:
                    memory.close()
                    memory = None
                answer = {}
                if size:
                    memory = Memory(endpoint, size, remote_write=True)
                    region = memory.region
                    answer = {"address": region.address, "rkey": region.rkey}
                print(json.dumps(answer), flush=True)
        finally:
            if memory is not None:
                memory.close()
            endpoint.close()
            listener.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    serve(sys.argv[1])
