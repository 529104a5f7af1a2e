# SPDX-License-Identifier: Apache-2.0
"""The migration stream over a device: cut anywhere, with all that may stand in its head."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import rdma_kit as kit
import snapshot_kit
from hooks_kit import Destination

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.memory import RamBlock
from rdma_mig.migration.events import Warned
from rdma_mig.migration.rdma import RdmaOptions
from rdma_mig.wire.control import ControlType, decode_ram_blocks
from rdma_mig.wire.stream import (
    Capabilities,
    CommandType,
    MachineUuid,
    StreamBlock,
    TargetPageBits,
    encode_command,
    encode_eos,
    encode_footer,
    encode_head,
    encode_hook,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)

pytestmark = pytest.mark.rdma

RAM_ID = 7
PAGE = 4096
UUID = bytes(range(16))
HEAD = encode_head("pc-q35-7.2", [TargetPageBits(12), MachineUuid(UUID)])
SHARED_HEAD = encode_head(
    "pc-q35-7.2", [TargetPageBits(12), Capabilities(("x-ignore-shared",)), MachineUuid(UUID)]
)
# All that a source may say between its configuration and RAM; none of it is of the machine.
COMMANDS = (
    encode_command(CommandType.OPEN_RETURN_PATH)
    + encode_command(CommandType.PING, b"\0\0\0\1")
    + encode_command(CommandType.POSTCOPY_ADVISE, (PAGE.to_bytes(8, "big")) * 2)
)
SWITCHOVER = encode_command(CommandType.SWITCHOVER_START)
LISTED = [StreamBlock("pc.ram", 16 * PAGE), StreamBlock("pc.rom", 3 * PAGE)]
BREAK = encode_eos() + encode_footer(RAM_ID)
STATE = snapshot_kit.STATE + kit.DESCRIPTION
LONG_STATE = b"\x04" + snapshot_kit.noise(700_000) + b"\0" + kit.DESCRIPTION

Cut = Callable[[bytes], Iterator[bytes]]


def every(size: int) -> Cut:
    """Messages of this many bytes."""

    def cut(data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), size):
            yield data[at : at + size]

    return cut


def at_borders(shift: int = 0) -> Cut:
    """One message for each field, or cuts so many bytes behind where a field begins.

    Fields are told apart by hand here, and not by the parser that is to be tested.
    """
    sizes = [4, 4, 1, 4, len("pc-q35-7.2")]
    for name, length in (("target-page-bits", 4), ("uuid", 16)):
        sizes += [1, 1, len(f"configuration/{name}"), 4, length]
    sizes += [1, 2, 2, 1, 2, 2, 4, 1, 2, 2, 8, 8]
    sizes += [1, 4, 1, 3, 4, 4, 8] + [1, 6, 8] * 2 + [8]
    borders = [list(accumulate(sizes)), [8, 1, 4, 1, 4, 8], [8, 1, 4, 1, 2, 2, 1, 4, 8]]
    borders[1:] = [list(accumulate(part)) for part in borders[1:]]
    # The end of RAM, the state up to EOF, and the description.
    last = [8, 1, 4, len(snapshot_kit.STATE) - 1, 1, 1, 4, len(snapshot_kit.DESCRIPTION)]
    borders.append(list(accumulate(last)))
    parts = iter(borders)

    def cut(data: bytes) -> Iterator[bytes]:
        ends = next(parts)
        assert ends[-1] == len(data), "the fields are not what the stream has"
        points = sorted({0, len(data), *(min(end + shift, len(data)) for end in ends)})
        for start, end in pairwise(points):
            yield data[start:end]

    return cut


def send_machine(
    peer: kit.Peer,
    cut: Cut,
    *,
    head: bytes = HEAD + COMMANDS,
    listed: list[StreamBlock] = LISTED,
    sent: list[StreamBlock] = LISTED,
    state: bytes = STATE,
) -> None:
    """Be a raw source: setup, a round, the end, device state; every block ends in data."""

    def stream(data: bytes) -> None:
        for piece in cut(data):
            peer.stream(piece)

    stream(head + encode_ram_start(RAM_ID, listed) + encode_hook())
    peer.command(ControlType.RAM_BLOCKS_REQUEST)
    records = decode_ram_blocks(
        peer.expect(ControlType.RAM_BLOCKS_RESULT), [block.length for block in sent]
    )
    peer.command(ControlType.REGISTER_FINISHED)
    stream(BREAK + encode_section_part(RAM_ID) + encode_hook())
    for number, record in enumerate(records):
        data = snapshot_kit.noise(PAGE, number)
        peer.write(record.host_address + record.length - PAGE, record.rkey, data)
    peer.command(ControlType.REGISTER_FINISHED)
    stream(BREAK + SWITCHOVER + encode_section_end(RAM_ID) + encode_hook())
    peer.command(ControlType.REGISTER_FINISHED)
    stream(BREAK + state)


def check_kept(path: Path, *, head: bytes = HEAD, state: bytes = STATE) -> dict:
    """The directory holds what was sent, byte for byte."""
    assert (path / "config.bin").read_bytes() == head
    assert (path / "vmstate.bin").read_bytes() == state
    assert (path / "vmdesc.json").read_bytes() == snapshot_kit.DESCRIPTION
    manifest = json.loads((path / "manifest.json").read_text())
    for number, block in enumerate(manifest["blocks"]):
        raw = (path / block["file"]).read_bytes()
        assert raw == bytes(block["length"] - PAGE) + snapshot_kit.noise(PAGE, number)
    return manifest


@pytest.mark.parametrize("size", [1, 7, 32767, 32768, 32769, 524272])
def test_messages_of_any_size(room, size):
    """Message borders mean nothing to our destination; the largest message is taken too."""
    state = STATE if size < 100 else LONG_STATE
    receive(room / "vm", every(size), state)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_messages_that_end_at_fields_or_within_them(room, shift):
    receive(room / "vm", at_borders(shift), STATE)


def receive(path: Path, cut: Cut, state: bytes) -> None:
    """Send a machine in these pieces to our destination, and check what it has kept."""
    with kit.incoming(path) as end, kit.dial(end.uri) as peer:
        send_machine(peer, cut, state=state)
        peer.endpoint.disconnect()
        end.succeed()
    check_kept(path, state=state)


@pytest.mark.parametrize("size", [1, 7, 5000, 32768, 524272])
def test_our_source_cuts_as_it_is_told(room, size):
    """What a destination gets is the stream, in messages of at most that size."""
    state = STATE if size < 100 else LONG_STATE
    receive(room / "vm", every(32768), state)
    with (
        kit.RawListener() as listener,
        kit.outgoing(room / "vm", listener.uri, stream_message=size) as out,
    ):
        peer = listener.accept()
        there = Destination(peer, [RamBlock(b.idstr, b.length) for b in LISTED])
        there.serve(until=kit.DESCRIPTION)
        peer.endpoint.disconnect()
        out.succeed()
    wanted = (
        HEAD + encode_ram_start(RAM_ID, LISTED) + encode_hook()
        + BREAK + encode_section_end(RAM_ID) + encode_hook() + BREAK + state
    )  # fmt: skip
    assert there.stream == wanted
    assert max(there.messages) == min(size, len(LONG_STATE))


@pytest.mark.parametrize("size", [0, 524273, -1])
def test_message_size_that_no_peer_takes(room, size):
    with pytest.raises(LocalProtocolError, match="1 to 524272"):
        RdmaOptions(stream_message=size)


# ---- the head ----


def replay(path: Path, blocks: list[StreamBlock]) -> bytes:
    """What outgoing sends of a snapshot to a destination that could be a QEMU."""
    with kit.RawListener() as listener, kit.outgoing(path, listener.uri) as out:
        peer = listener.accept()
        there = Destination(peer, [RamBlock(b.idstr, b.length) for b in blocks])
        there.serve(until=kit.DESCRIPTION)
        peer.endpoint.disconnect()
        out.succeed()
    return there.stream


def test_configuration_is_replayed_and_commands_are_not(room):
    """Subsections are the machine's, byte for byte; commands are about a connection that is over.

    A QEMU that was sent them again would end: it has no return path, or no postcopy.
    """
    receive(room / "vm", every(32768), STATE)
    stream = replay(room / "vm", LISTED)
    assert stream.startswith(HEAD + encode_ram_start(RAM_ID, LISTED) + encode_hook())
    assert stream.endswith(BREAK + STATE)


SHARED_LISTED = [
    StreamBlock("pc.ram", 1 << 40, guest_address=0),
    StreamBlock("pc.bios", 2 * PAGE, guest_address=0xFFFC0000),
    StreamBlock("pc.rom", 3 * PAGE, guest_address=0xC0000),
]


def test_shared_block_stays_where_it_is(room):
    """All three subsections; a shared TiB takes no memory, no disk, and no index on the wire."""
    path = room / "vm"
    with kit.incoming(path) as end, kit.dial(end.uri) as peer:
        send_machine(
            peer, every(32768), head=SHARED_HEAD, listed=SHARED_LISTED, sent=SHARED_LISTED[1:]
        )
        peer.endpoint.disconnect()
        end.succeed()
    warned = [event.message for event in end.events if isinstance(event, Warned)]
    assert any("pc.ram is taken as shared" in message for message in warned)
    manifest = check_kept(path, head=SHARED_HEAD)
    assert manifest["version"] == 2
    assert manifest["shared_blocks"] == [
        {"position": 0, "name": "pc.ram", "length": 1 << 40, "page_size": None, "guest_address": 0}
    ]
    stream = replay(path, SHARED_LISTED[1:])
    assert stream.startswith(SHARED_HEAD + encode_ram_start(RAM_ID, SHARED_LISTED[1:]))


# ---- what cannot be skipped ----

VFIO, BITMAP = "0000:00:05.0/vfio", "dirty-bitmap"


def section(kind: int, name: str) -> bytes:
    """The head of a START (1) or FULL (4) of another section, and a piece of its body."""
    return (
        bytes([kind]) + (9).to_bytes(4, "big") + bytes([len(name)]) + name.encode()
        + bytes(4) + (1).to_bytes(4, "big") + b"body"
    )  # fmt: skip


OTHER = {
    "START of VFIO": (section(1, VFIO), VFIO),
    "FULL of VFIO": (section(4, VFIO), VFIO),
    "START of bitmaps": (section(1, BITMAP), BITMAP),
    "FULL of a device": (section(4, "serial"), "serial"),
    "PART of a section without START": (b"\x02" + (9).to_bytes(4, "big"), "section 9"),
    "END of a section without START": (b"\x03" + (9).to_bytes(4, "big"), "section 9"),
}
PLACES = ("before RAM", "after setup", "between rounds", "before the end")


@pytest.mark.parametrize("place", PLACES)
def test_other_live_sections_are_refused_by_name(tmp_path, place):
    """They have no length, so nobody could tell where they end; the guest stays at its source."""
    for number, (data, named) in enumerate(OTHER.values()):
        path = tmp_path / f"vm{number}"
        with kit.incoming(path) as end, kit.dial(end.uri) as peer:
            if place == "before RAM":
                peer.stream(HEAD + data)
            else:
                peer.stream(HEAD + encode_ram_start(RAM_ID, LISTED) + encode_hook())
                peer.command(ControlType.RAM_BLOCKS_REQUEST)
                peer.expect(ControlType.RAM_BLOCKS_RESULT)
                peer.command(ControlType.REGISTER_FINISHED)
                for _ in range(PLACES.index(place) - 1):
                    peer.stream(BREAK + encode_section_part(RAM_ID) + encode_hook())
                    peer.command(ControlType.REGISTER_FINISHED)
                peer.stream(BREAK + data)
            error = end.fail(RemoteProtocolError, named)
            assert "goes on running there" in error.owner
        assert not path.exists()
