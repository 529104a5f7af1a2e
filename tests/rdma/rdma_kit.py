# SPDX-License-Identifier: Apache-2.0
"""Both ends for the tests over a real verbs device: our own, and peers that can misbehave.

A raw peer has the connection of the verbs layer and nothing above it: it says what a test tells
it to say. It lives in a thread of the test's process, or in one of its own (``rdma_peer.py``).
"""

from __future__ import annotations

import compileall
import contextlib
import functools
import ipaddress
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import snapshot_kit

import rdma_mig
from rdma_mig.errors import (
    MigrationCancelled,
    MigrationError,
    MigrationTimeout,
    PeerGone,
    RemoteProtocolError,
)
from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.events import MigrationEvent
from rdma_mig.migration.rdma import (
    RdmaOptions,
    rdma_start_incoming_migration,
    rdma_start_outgoing_migration,
)
from rdma_mig.migration.receive import SnapshotDestination
from rdma_mig.migration.send import SnapshotSource
from rdma_mig.migration.state import Migration
from rdma_mig.snapshot import Snapshot
from rdma_mig.tracing import Trace
from rdma_mig.verbs import addresses
from rdma_mig.verbs.connector import connect
from rdma_mig.verbs.endpoint import Endpoint, EndpointOptions
from rdma_mig.verbs.events import ADDR_RESOLVED, CONNECT_RESPONSE, ROUTE_RESOLVED, EventChannel
from rdma_mig.verbs.listener import Admission, Listener
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, Deadline
from rdma_mig.wire.address import RdmaAddress
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    RamBlockRecord,
    decode_ram_blocks,
    encode_ram_blocks,
)
from rdma_mig.wire.stream import (
    StreamBlock,
    encode_eos,
    encode_footer,
    encode_hook,
    encode_ram_start,
    encode_section_end,
)

PLAIN = b"\0\0\0\1\0\0\0\1"
"""Private data as QEMU sends it: version 1, pin-all."""

MIB = 1 << 20
BLOCKS = (RamBlock("pc.ram", 3 * MIB + 8192), RamBlock("vga.vram", MIB), RamBlock("pc.rom", 131072))
RAM_ID = 2


def paint(memories: list[GuestMemory]) -> None:
    """Data at borders of blocks and chunks, and the rest zero."""
    with memories[0].view() as view:
        view[: 64 * 4096] = snapshot_kit.noise(64 * 4096)
        view[MIB - 1 : MIB + 1] = b"\1\2"
        view[-1] = 3
    with memories[2].view() as view:
        view[:] = snapshot_kit.noise(len(view), 2)


@functools.cache
def patience(seconds: float) -> float:
    """A limit that is no requirement but a backstop, for a host as slow as this one."""
    return seconds * _slowness()


@functools.cache
def _slowness() -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        sum(range(1_000_000))
        times.append(time.perf_counter() - began)
    # A usual host takes 15 ms.
    return min(max(1.0, min(times) / 0.02), 15.0)


@functools.cache
def device() -> tuple[str, str]:
    """Name and IPv4 address of the device to test with."""
    # Imported here: a peer's process does without, and starts sooner.
    from harness.device import device_address

    return device_address()


def resources() -> dict[str, int]:
    """The verbs objects that exist on the device, of all processes, as the kernel counts them."""
    shown = subprocess.run(
        ["rdma", "-j", "resource", "show"], capture_output=True, timeout=60, check=True
    ).stdout
    entry = next(entry for entry in json.loads(shown) if entry["ifname"] == device()[0])
    return {kind: entry[kind] for kind in ("pd", "cq", "qp", "cm_id", "mr", "ctx")}


def settle(before: dict[str, int]) -> None:
    """Wait until no more verbs objects exist than before; the kernel takes a moment."""
    end = time.monotonic() + patience(5)
    while any(now > before[kind] for kind, now in resources().items()):
        assert time.monotonic() < end, f"left behind: {before} became {resources()}"
        time.sleep(0.05)


def pinned() -> int:
    """Bytes that this process has pinned in memory regions (VmPin)."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmPin:")
    )
    return int(line.split()[1]) * 1024


def is_plain_install() -> bool:
    """Whether the package and its extension modules lie in one directory."""
    from rdma_mig import _pages

    return Path(_pages.__file__).parent == Path(rdma_mig.__file__).parent


def copy_package(target: Path) -> None:
    """Put the package, with the extension modules in use, into one directory."""
    from rdma_mig import _pages

    source = Path(rdma_mig.__file__).parent
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    load()  # now: what the fixture sets keeps the editable install from finding it later
    for module in Path(_pages.__file__).parent.glob("_*.so"):
        shutil.copy(module, target)
    compileall.compile_dir(target, quiet=2)


class Worker(threading.Thread):
    """Runs a function in a thread; result() returns what it returned, or raises."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._error: BaseException | None = None
        self._value: Any = None
        self.start()

    def run(self) -> None:
        """Called by the thread."""
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error

    def result(self, seconds: float = 20) -> Any:
        """Wait for its end."""
        self.join(patience(seconds))
        assert not self.is_alive(), "the thread did not end"
        if self._error is not None:
            raise self._error
        return self._value


# ---- raw peers ----


class Peer:
    """A connection to say anything over."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.verbs = load()
        self.ram: GuestRam | None = None
        self.records: list[RamBlockRecord] = []

    def send(self, message: ControlMessage | bytes, *, wait: bool = True) -> None:
        """Send a message, or bytes that are none."""
        raw = message if isinstance(message, bytes) else message.encode()
        self.endpoint.queue.post_send(raw)
        if wait:
            self.endpoint.wait(self.verbs.WAIT_SEND, "a send", Deadline.after(patience(10)))

    def receive(self, seconds: float = 10) -> ControlMessage:
        """Wait for a message."""
        received = self.endpoint.queue.next_received()
        while received is None:
            self.endpoint.wait(
                self.verbs.WAIT_RECEIVE, "a message", Deadline.after(patience(seconds))
            )
            received = self.endpoint.queue.next_received()
        return ControlMessage.decode(received)

    def expect(self, kind: ControlType, seconds: float = 10) -> bytes:
        """Wait for a message of this type, and return its payload."""
        message = self.receive(seconds)
        assert message.type is kind, f"{message.type.name} instead of {kind.name}"
        return message.payload

    def ready(self) -> None:
        """Ask for one message."""
        self.send(ControlMessage(ControlType.READY))

    def stream(self, data: bytes) -> None:
        """Send bytes of the stream, when they are asked for."""
        self.expect(ControlType.READY)
        self.send(ControlMessage(ControlType.QEMU_FILE, data, repeat=0))

    def command(self, kind: ControlType) -> None:
        """Send a message without payload, when one is asked for."""
        self.expect(ControlType.READY)
        self.send(ControlMessage(kind))

    def write(self, address: int, rkey: int, data: bytes) -> None:
        """Write into the other end's memory, and wait until it is there."""
        with GuestMemory(len(data), "from the test") as memory:
            with memory.view() as view:
                view[:] = data
            region = self.endpoint.register(
                memory.address, len(data), what="data", remote_write=False, holder=None
            )
            try:
                queue = self.verbs.WriteQueue(
                    self.endpoint.queue, chunk_size=MIB, max_write=MIB, interrupted=self._stop
                )
                queue.set_targets([(region.address, region.lkey, address, rkey, len(data))])
                queue.open()
                queue.save_page(0, 0, len(data))
                queue.flush()
                queue.close()
                self.endpoint.wait(self.verbs.WAIT_WRITES, "a write", Deadline.after(patience(10)))
            finally:
                self.endpoint.deregister_all()

    def play_dead(self) -> None:
        """Answer nothing from now on, as a host that has lost its network or its power."""
        self.verbs.fail_queue_pair(self.endpoint._qp)

    def _stop(self, outcome: int) -> None:
        raise AssertionError(f"a write met {outcome}")

    def close(self) -> None:
        """Disconnect."""
        self.endpoint.close()
        if self.ram is not None:
            self.ram.close()


@contextlib.contextmanager
def dial(
    uri: str, private_data: bytes = PLAIN, options: EndpointOptions | None = None
) -> Iterator[Peer]:
    """A raw source, connected."""
    address = RdmaAddress.parse(uri, listening=False)
    with Cancel() as cancel:
        peer = Peer(
            connect(address.host, address.port, private_data, cancel, options or EndpointOptions())
        )
        try:
            yield peer
        finally:
            peer.close()


@contextlib.contextmanager
def half_open(uri: str) -> Iterator[None]:
    """A client that was accepted and does not confirm it, as long as this lasts."""
    from pyverbs.cmid import CMID, ConnParam

    address = RdmaAddress.parse(uri, listening=False)
    packed = addresses.pack((socket.AF_INET, address.host, address.port))
    with Cancel() as cancel, contextlib.ExitStack() as closing:
        events = EventChannel()
        closing.callback(events.close)
        cmid = CMID(creator=events.raw)

        def awaited(kind: int) -> None:
            event = events.next("being half open", uri, Deadline.after(patience(5)), cancel)
            assert event.type == kind

        load().resolve_address(cmid, None, packed, 2000)
        awaited(ADDR_RESOLVED)
        cmid.resolve_route(2000)
        awaited(ROUTE_RESOLVED)
        endpoint = Endpoint(cmid, events, cancel, EndpointOptions())
        closing.callback(endpoint.close)
        asked = ConnParam(qp_num=endpoint.qp_number, data_len=len(PLAIN))
        asked.set_private_data(PLAIN)
        cmid.connect(asked)
        awaited(CONNECT_RESPONSE)
        yield


def dial_and_forget(cancel: Cancel) -> Endpoint:
    """A connection whose other end is gone, for the caller not to close."""
    with RawListener() as listener:
        accepted = Worker(listener.accept)
        endpoint = connect(*listener.listener.address, PLAIN, cancel, EndpointOptions())
        accepted.result()
        return endpoint


def ipv6_address() -> str:
    """An IPv6 address of the device, not a link-local one."""
    for path in sorted(Path("/sys/class/infiniband", device()[0]).glob("ports/*/gids/*")):
        address = ipaddress.IPv6Address(path.read_text().strip())
        if int(address) and not address.ipv4_mapped and not address.is_link_local:
            return str(address)
    raise AssertionError(f"{device()[0]} has no IPv6 address")


class RawListener:
    """A raw destination, listening; a context manager."""

    def __init__(self, options: EndpointOptions | None = None, host: str = "") -> None:
        self.cancel = Cancel()
        self.listener = Listener(host or device()[1], 0, self.cancel, options or EndpointOptions())
        self.peer: Peer | None = None
        self._worker: Worker | None = None
        self.asked = b""

    @property
    def uri(self) -> str:
        """Where it listens."""
        return str(RdmaAddress(*self.listener.address))

    def accept(
        self, reply: bytes = PLAIN, seconds: float = 10, *, return_path: bool = False
    ) -> Peer:
        """Wait for a source; with ``return_path`` take one more connection from it."""

        def answer(private_data: bytes, _peer: str) -> bytes:
            self.asked = private_data
            return reply

        others = (lambda _data, _peer: Admission(reply)) if return_path else None
        self.peer = Peer(self.listener.accept(answer, Deadline.after(patience(seconds)), others))
        return self.peer

    def second(self, seconds: float = 10) -> Peer:
        """Wait for the source's second connection."""
        deadline = Deadline.after(patience(seconds))
        while not ((other := self.listener.others.get(0)) and other.is_connected):
            assert not deadline.passed, "the source opened no second connection"
            self.listener.events.wait(deadline, self.cancel)
            self.listener.events.dispatch()
        return Peer(other)

    def serve(self, step: str, reply: bytes = PLAIN) -> None:
        """Accept a source and behave well up to this step, in a thread that ends with this."""

        def work() -> None:
            until(step, act_as_destination(self.accept(reply, 60)))

        self._worker = Worker(work)

    def __enter__(self) -> RawListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel.request()
        if self._worker is not None:
            # What it met does not matter: the test looks at the other end.
            with contextlib.suppress(MigrationError):
                self._worker.result()
        if self.peer is not None:
            self.peer.close()
        self.listener.close()
        self.cancel.close()


# ---- what a well-behaved peer does, step by step ----

HEAD = snapshot_kit.HEAD + encode_ram_start(
    RAM_ID, [StreamBlock(block.idstr, block.length) for block in BLOCKS]
)
SECTION_BREAK = encode_eos() + encode_footer(RAM_ID)
DESCRIPTION = b"\x06" + len(snapshot_kit.DESCRIPTION).to_bytes(4, "big") + snapshot_kit.DESCRIPTION
SOURCE_STEPS = (
    "connected", "in setup", "blocks known", "setup done", "in the last phase", "RAM written",
    "RAM handed over", "within the device state", "device state sent",
)  # fmt: skip
COMMITTED = SOURCE_STEPS.index("RAM handed over")


def act_as_source(peer: Peer, head: bytes = HEAD) -> Iterator[str]:
    """Send a guest to a destination; each value names what has been done when it is yielded."""
    steps = iter(SOURCE_STEPS)
    yield next(steps)
    peer.stream(head + encode_hook())
    yield next(steps)
    peer.command(ControlType.RAM_BLOCKS_REQUEST)
    payload = peer.expect(ControlType.RAM_BLOCKS_RESULT)
    peer.records = decode_ram_blocks(payload, [block.length for block in BLOCKS])
    yield next(steps)
    peer.command(ControlType.REGISTER_FINISHED)
    yield next(steps)
    peer.stream(SECTION_BREAK + encode_section_end(RAM_ID) + encode_hook())
    yield next(steps)
    peer.write(peer.records[0].host_address, peer.records[0].rkey, b"\x5a" * 4096)
    yield next(steps)
    peer.command(ControlType.REGISTER_FINISHED)
    yield next(steps)
    peer.stream(SECTION_BREAK + snapshot_kit.STATE[:-1])
    yield next(steps)
    peer.stream(snapshot_kit.STATE[-1:] + DESCRIPTION)
    yield next(steps)


DESTINATION_STEPS = (
    "connected", "in setup", "blocks asked for", "blocks told", "setup done", "in the last phase",
    "RAM written", "RAM section ended", "within the device state", "end mark received",
    "all received",
)  # fmt: skip


def act_as_destination(peer: Peer) -> Iterator[str]:
    """Receive a guest; each value names what has been done when it is yielded."""
    steps = iter(DESTINATION_STEPS)

    def receive(kind: ControlType) -> bytes:
        peer.ready()
        return peer.expect(kind)

    yield next(steps)
    receive(ControlType.QEMU_FILE)
    yield next(steps)
    receive(ControlType.RAM_BLOCKS_REQUEST)
    yield next(steps)
    peer.send(ControlMessage(ControlType.RAM_BLOCKS_RESULT, encode_ram_blocks(offer(peer))))
    yield next(steps)
    receive(ControlType.REGISTER_FINISHED)
    yield next(steps)
    receive(ControlType.QEMU_FILE)
    yield next(steps)
    receive(ControlType.REGISTER_FINISHED)
    yield next(steps)
    for _ in range(4):
        receive(ControlType.QEMU_FILE)
        yield next(steps)


def offer(peer: Peer, blocks: Sequence[RamBlock] = BLOCKS) -> list[RamBlockRecord]:
    """Memory of the peer's for all blocks, registered."""
    peer.ram = GuestRam(blocks)
    peer.ram.populate(lambda: False)
    for guest in peer.ram:
        region = peer.endpoint.register(
            guest.memory.address, guest.block.length, what="RAM", remote_write=True,
            holder=guest.memory.hold("the peer"),
        )  # fmt: skip
        peer.records.append(
            RamBlockRecord(region.address, guest.offset, guest.block.length, region.rkey)
        )
    return peer.records


def until(step: str, steps: Iterator[str]) -> None:
    """Behave well up to this step."""
    for done in steps:
        if done == step:
            return
    raise AssertionError(f"there is no step {step}")


# ---- our own ends ----


def check_line(error: MigrationError) -> None:
    """What an operator has to be told of a failure that the other end has to do with."""
    line = str(error)
    assert error.step, f"it does not say at which step: {line}"
    assert error.owner, f"it does not say who owns the virtual machine: {line}"
    if isinstance(error, MigrationCancelled):
        return  # it was what somebody wanted
    assert error.remedy, f"it does not say what to do: {line}"
    if isinstance(error, (PeerGone, RemoteProtocolError, MigrationTimeout)):
        assert re.search(r"\d\S*:\d+", error.message), f"it does not say from whom: {line}"
    assert line.index(error.message) < line.index(error.owner) < line.index(error.remedy)


class End:
    """One of our own ends at work.

    Attributes:
        migration: it.
        uri: where it listens; empty for a source.
        events: what it has told.
    """

    def __init__(self, trace: Trace | None = None) -> None:
        self.events: list[MigrationEvent] = []
        self.migration = Migration(self.events.append, trace)
        self.uri = ""

    def fail(
        self, kind: type[MigrationError], match: str | None = None, seconds: float = 20
    ) -> MigrationError:
        """Wait until it has failed with this error, and check what an operator would read."""
        import pytest

        with pytest.raises(kind, match=match) as caught:
            assert self.migration.wait(patience(seconds)), "it neither failed nor ended"
        error = caught.value
        assert error.exit_status == kind.exit_status
        assert "\n" not in str(error)
        assert "unexpected" not in str(error)
        check_line(error)
        return error

    def succeed(self, seconds: float = 20) -> None:
        """Wait until it is done."""
        assert self.migration.wait(patience(seconds))


@contextlib.contextmanager
def incoming(
    output: Path,
    *,
    host: str = "",
    max_ram: int | None = None,
    huge_pages: bool = False,
    sync_before: bool = False,
    trace: Trace | None = None,
    **options: Any,
) -> Iterator[End]:
    """Our destination, listening."""
    end = End(trace)
    destination = SnapshotDestination(
        output, max_ram=max_ram, huge_pages=huge_pages, sync_before=sync_before
    )
    try:
        with end.migration:
            end.uri = str(
                rdma_start_incoming_migration(
                    f"rdma:{host or device()[1]}:0",
                    migration=end.migration,
                    process=destination.process,
                    options=RdmaOptions(**options),
                )
            )
            yield end
    finally:
        end.migration.close()
        destination.close()


@contextlib.contextmanager
def outgoing(
    directory: Path, uri: str, *, trace: Trace | None = None, **options: Any
) -> Iterator[End]:
    """Our source, connecting."""
    end = End(trace)
    with Snapshot.open(directory) as snapshot:
        source = SnapshotSource(snapshot)
        try:
            with end.migration:
                source.load(end.migration)
                rdma_start_outgoing_migration(
                    end.migration, uri, ram=source.ram, save=source.save,
                    options=RdmaOptions(**{"pin_all": True, **options}),
                )  # fmt: skip
                yield end
        finally:
            end.migration.close()
            source.close()
