# SPDX-License-Identifier: Apache-2.0
"""What ``rdma-migrate inspect`` shows of a migration stream in a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rdma_mig.errors import ProtocolError, RemoteProtocolError, UsageError
from rdma_mig.memory.blocks import RamBlock
from rdma_mig.memory.meminfo import available_memory
from rdma_mig.memory.page_stream import PageReader
from rdma_mig.memory.ram import GuestRam
from rdma_mig.snapshot import human
from rdma_mig.wire.description import DeviceStateScanner, parse_description
from rdma_mig.wire.stream import RamPart, RamStart, SectionEnd, StreamHead, StreamParser
from rdma_mig.words import printable

__all__ = ["lines_of_stream", "report_of_stream"]

_READ_SIZE = 1 << 20


class _Pages:
    """Loads pages into memory of their own: what is wrong with a record is found by that."""

    def __init__(self) -> None:
        self.ram: GuestRam | None = None
        self.reader: PageReader | None = None

    def sink(self, start: RamStart) -> PageReader:
        total = sum(block.length for block in start.blocks)
        if total > available_memory():
            raise UsageError(f"the stream holds {total >> 20} MiB of RAM, more than this host has")
        self.ram = GuestRam(
            [RamBlock(b.idstr, b.length, b.page_size, b.guest_address) for b in start.blocks]
        )
        self.reader = PageReader(self.ram)
        return self.reader


def report_of_stream(path: Path) -> dict[str, Any]:
    """Read a whole stream; return what ``--json`` prints.

    Raises:
        RemoteProtocolError: it is no stream, or not a whole one.
        UsageError: its RAM does not fit into memory.
    """
    pages = _Pages()
    try:
        return _report(path, pages)
    except ProtocolError as error:
        # What the parser advises is for a peer that can be asked; a file is what it is.
        raise RemoteProtocolError(
            f"{path} is no whole migration stream: {error.message}",
            remedy="name a snapshot directory, or a file that QEMU or rdma-migrate has written",
        ) from error
    finally:
        if pages.ram is not None:
            pages.ram.close()


def _report(path: Path, pages: _Pages) -> dict[str, Any]:
    parser, scanner = StreamParser(pages.sink), DeviceStateScanner()
    machine: str | None = None
    start: RamStart | None = None
    footers, rounds = False, 0
    with path.open("rb") as file:
        while not parser.in_device_state:
            match parser.next_event():
                case StreamHead() as head:
                    machine = head.machine
                case RamStart() as start:
                    pass
                case RamPart():
                    rounds += 1
                case SectionEnd() as end:
                    footers = end.has_footer
                case None if not parser.in_device_state:
                    if not (data := file.read(_READ_SIZE)):
                        raise RemoteProtocolError(f"it ends where {parser.awaiting} is due")
                    parser.feed(data)
        scanner.feed(parser.remainder())
        while data := file.read(_READ_SIZE):
            scanner.feed(data)
    if not scanner.complete:
        raise RemoteProtocolError("it ends within the device state, or something follows it")
    assert start is not None
    counters = pages.reader.counters if pages.reader is not None else None
    return {
        "path": str(path),
        "machine": machine,
        "stream": {"ram_section_id": start.section_id, "footers": footers, "rounds": rounds + 1},
        "ram": {
            "length": sum(block.length for block in start.blocks),
            "blocks": [asdict(block) for block in start.blocks],
            "normal_pages": counters.normal if counters else 0,
            "duplicate_pages": counters.duplicate if counters else 0,
            "xbzrle_pages": counters.xbzrle_pages if counters else 0,
        },
        "device_state": {"size": scanner.total, "eof_offset": scanner.eof_offset},
        "devices": [asdict(device) for device in parse_description(scanner.description).devices],
    }


def lines_of_stream(report: dict[str, Any]) -> list[str]:
    """Return the lines for people, of what report_of_stream() returned."""
    ram, state = report["ram"], report["device_state"]
    return [
        f"stream        {printable(report['path'])}",
        f"machine       {printable(report['machine'] or 'not named')}",
        f"RAM           {human(ram['length'])} in {len(ram['blocks'])} blocks; "
        f"{ram['normal_pages']} pages sent, {ram['duplicate_pages']} as zero, "
        f"{ram['xbzrle_pages']} as what has changed in them",
        f"rounds        {report['stream']['rounds']}",
        f"device state  {state['eof_offset']} bytes to EOF, {state['size']} in all",
        "",
        *(f"block   {printable(b['idstr'])}  {human(b['length'])}" for b in ram["blocks"]),
        *(f"device  {printable(d['name'])} {d['instance_id']}" for d in report["devices"]),
    ]
