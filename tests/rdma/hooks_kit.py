# SPDX-License-Identifier: Apache-2.0
"""A small engine that calls the hooks page by page, and what the tests of the hooks share."""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import rdma_kit as kit
import snapshot_kit

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import PeerGone
from rdma_mig.memory import RamBlock
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_FINISH,
    RAM_CONTROL_ROUND,
    RAM_CONTROL_SETUP,
    RAM_SAVE_CONTROL_DELAYED,
    ram_control_after_iterate,
    ram_control_before_iterate,
    ram_control_save_page,
)
from rdma_mig.migration.rdma import RdmaOptions, rdma_start_outgoing_migration
from rdma_mig.migration.state import Migration
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    RegisterResult,
    ZeroRun,
    decode_register_requests,
    encode_ram_blocks,
)
from rdma_mig.wire.stream import encode_section_end, encode_section_part

PAGE = 4096
CHUNK = kit.MIB // PAGE
RAM = kit.BLOCKS[0].length
_DYNAMIC = kit.PLAIN[:-1] + b"\0"


class Engine:
    """A destination in a process of its own (rdma_engine.py)."""

    def __init__(self, count: int = 1) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable, "-X", "dev", "-W", "error::ResourceWarning",
                Path(__file__).with_name("rdma_engine.py"), kit.device()[1], str(count),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def told(self) -> dict:
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def close(self) -> str:
        """End it, and return what it has complained about."""
        try:
            _, err = self.process.communicate(timeout=kit.patience(20))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return err


def digests(ram: GuestRam) -> list[str]:
    found = []
    for guest in ram:
        with guest.memory.view() as view:
            found.append(hashlib.sha256(view).hexdigest())
    return found


Save = Callable[[QEMUFile, "Counts"], None]


class Counts:
    """What one call after the other has written."""

    def __init__(self, transport) -> None:
        self._transport = transport
        self._writes = self._bytes = 0

    def new(self) -> tuple[int, int]:
        """Writes and bytes since the last time."""
        writes, size = self._transport.writes, self._transport.bytes_written
        new = writes - self._writes, size - self._bytes
        self._writes, self._bytes = writes, size
        return new


def begin(file: QEMUFile) -> None:
    """The stream up to the first pages, setup phase included."""
    file.put(kit.HEAD)
    ram_control_before_iterate(file, RAM_CONTROL_SETUP)
    ram_control_after_iterate(file, RAM_CONTROL_SETUP)
    file.put(kit.SECTION_BREAK)


def a_round(file: QEMUFile, save: Callable[[], None]) -> None:
    file.put(encode_section_part(kit.RAM_ID))
    ram_control_before_iterate(file, RAM_CONTROL_ROUND)
    save()
    ram_control_after_iterate(file, RAM_CONTROL_ROUND)
    file.put(kit.SECTION_BREAK)


def finish(file: QEMUFile, save: Callable[[], None] = lambda: None) -> None:
    file.put(encode_section_end(kit.RAM_ID))
    ram_control_before_iterate(file, RAM_CONTROL_FINISH)
    save()
    ram_control_after_iterate(file, RAM_CONTROL_FINISH)
    file.put(kit.SECTION_BREAK + snapshot_kit.STATE)
    file.flush()


def run(uri: str, ram: GuestRam, save: Save, **options) -> None:
    """One migration out of this process, through the header's function."""
    with Migration() as migration:
        rdma_start_outgoing_migration(
            migration, uri, ram=ram,
            save=lambda _, file, transport: save(file, Counts(transport)),
            options=RdmaOptions(**{"pin_all": True, **options}),
        )  # fmt: skip
        assert migration.wait(kit.patience(20))


def pages(file: QEMUFile, first: int, count: int, block: int = 0, size: int = PAGE) -> None:
    """Offer pages one by one, as QEMU's RAM code does."""
    start = sum(-(-b.length // kit.MIB) * kit.MIB for b in kit.BLOCKS[:block])
    for page in range(first, first + count):
        sent = ctypes.c_int(0)
        result = ram_control_save_page(file, start, page * PAGE, size, sent)
        assert result == RAM_SAVE_CONTROL_DELAYED
        assert sent.value == 1


# ---- a destination to be looked at ----


class Destination:
    """A raw destination that serves whatever comes, and whose memory can be looked at.

    Attributes:
        stream: what has come of the stream.
        messages: how many bytes of it came at a time.
        zero_runs: what was announced as zero.
    """

    def __init__(self, peer: kit.Peer, blocks: Sequence[RamBlock]) -> None:
        self.stream = b""
        self.messages: list[int] = []
        self.zero_runs: list[ZeroRun] = []
        self._peer = peer
        self._blocks = blocks

    @classmethod
    def set_up(cls, listener: kit.RawListener, *, pin_all: bool) -> Destination:
        """One that a source has connected to, behind the setup phase."""
        peer = listener.accept(kit.PLAIN if pin_all else _DYNAMIC)
        kit.until("setup done", kit.act_as_destination(peer))
        return cls(peer, kit.BLOCKS)

    def serve(self, until: bytes | None = None) -> None:
        """Answer until the stream ends with these bytes, or the source disconnects."""
        peer = self._peer
        while until is None or not self.stream.endswith(until):
            try:
                peer.ready()
                message = peer.receive(30)
            except PeerGone:
                return
            if message.type is ControlType.QEMU_FILE:
                self.stream += message.payload
                self.messages.append(len(message.payload))
            elif message.type is ControlType.RAM_BLOCKS_REQUEST:
                records = encode_ram_blocks(kit.offer(peer, self._blocks))
                peer.send(ControlMessage(ControlType.RAM_BLOCKS_RESULT, records))
            elif message.type is ControlType.REGISTER_REQUEST:
                self.answer_register(message)
            elif message.type is ControlType.COMPRESS:
                self.zero_runs.append(ZeroRun.decode(message.payload))
            else:
                assert message.type is ControlType.REGISTER_FINISHED

    def answer_register(self, message: ControlMessage) -> None:
        """Answer with the key of the whole block, which is legal."""
        (record,) = decode_register_requests(message.payload)
        block = self._peer.records[record.block_index]
        result = RegisterResult(block.rkey, block.host_address).encode()
        self._peer.send(ControlMessage(ControlType.REGISTER_RESULT, result))

    def has(self, ram: GuestRam, first: int, count: int, block: int = 0) -> bool:
        """Whether these pages have arrived."""
        extent = slice(first * PAGE, (first + count) * PAGE)
        with self._peer.ram[block].memory.view() as here, ram[block].memory.view() as there:
            return bytes(here[extent]) == bytes(there[extent])

    def lacks(self, first: int, count: int, block: int = 0) -> bool:
        """Whether nothing of these pages has arrived."""
        with self._peer.ram[block].memory.view() as here:
            return not any(here[first * PAGE : (first + count) * PAGE])


# ---- what the device counts ----


def counter(name: str) -> int | None:
    """One of the device's own counters of its port; None where it has no such one."""
    counters = Path(f"/sys/class/infiniband/{kit.device()[0]}/ports/1/hw_counters")
    if not (counters / name).exists():
        return None
    # The kernel hands out what it has read before, for so many milliseconds.
    time.sleep(2 * int((counters / "lifespan").read_text()) / 1000)
    return int((counters / name).read_text())


def sent_packets() -> int | None:
    """Packets that the device has sent; None where it does not count them."""
    return counter("sent_pkts")


class Traffic:
    """What has crossed the port since the last look: packets in all, and messages (SENDs).

    Both ends use the device, so what either sends counts, acknowledgements too. A device that
    counts neither fails the test.
    """

    def __init__(self) -> None:
        self._packets, self._messages = self._read()

    def _read(self) -> tuple[int, int]:
        while True:
            found = counter("sent_pkts"), counter("rdma_sends")
            assert None not in found, f"{kit.device()[0]} does not count packets and messages"
            if found == (counter("sent_pkts"), counter("rdma_sends")):
                return found  # at rest

    def new(self) -> tuple[int, int]:
        """Packets and messages since the last time."""
        packets, messages = self._read()
        new = packets - self._packets, messages - self._messages
        self._packets, self._messages = packets, messages
        return new
