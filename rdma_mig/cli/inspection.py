# SPDX-License-Identifier: Apache-2.0
"""What ``rdma-migrate inspect`` shows: gathered as plain values, then set as text."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from rdma_mig.errors import ProtocolError
from rdma_mig.snapshot import Snapshot, human
from rdma_mig.wire.description import parse_description
from rdma_mig.words import printable

__all__ = ["lines_of", "report_of"]


def report_of(snapshot: Snapshot, *, verified: bool) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    manifest = snapshot.manifest
    return {
        "path": str(snapshot.path),
        "format_version": manifest.version,
        "machine": manifest.machine,
        "stream": {
            "ram_section_id": manifest.ram_section_id,
            "footers": manifest.footers,
            "page_bits": manifest.page_bits,
        },
        "ram": {
            "length": sum(record.block.length for record in manifest.blocks),
            "data_bytes": sum(record.data_bytes for record in manifest.blocks),
            "blocks": [
                {
                    "index": index,
                    "name": record.block.idstr,
                    "length": record.block.length,
                    "data_bytes": record.data_bytes,
                    "page_size": record.block.page_size,
                    "guest_address": record.block.guest_address,
                    "digests_sha256": record.digests_sha256,
                }
                for index, record in enumerate(manifest.blocks)
            ],
            "shared_blocks": [
                {
                    "position": shared.position,
                    "name": shared.block.idstr,
                    "length": shared.block.length,
                    "page_size": shared.block.page_size,
                    "guest_address": shared.block.guest_address,
                }
                for shared in manifest.shared
            ],
        },
        "config": asdict(manifest.config),
        "device_state": asdict(manifest.device_state) | {"eof_offset": manifest.eof_offset},
        "description": _description(snapshot),
        "command": _command(snapshot),
        "restored": snapshot.restorations(),
        "verified": True if verified else None,
    }


def _command(snapshot: Snapshot) -> dict[str, Any] | None:
    command = snapshot.command()
    if command is None:
        return None
    return {"arguments": list(command.arguments), "directory": command.directory}


def _description(snapshot: Snapshot) -> dict[str, Any] | None:
    raw = snapshot.description
    if raw is None or snapshot.manifest.description is None:
        return None
    result = asdict(snapshot.manifest.description)
    try:
        parsed = parse_description(raw)
    except ProtocolError as error:
        # The source's text, kept as it came. All else about the snapshot can still be told.
        return result | {"page_size": None, "devices": None, "error": error.message}
    return result | {
        "page_size": parsed.page_size,
        "devices": [
            {
                "name": device.name,
                "instance_id": device.instance_id,
                "vmsd_name": device.vmsd_name,
                "version": device.version,
            }
            for device in parsed.devices
        ],
        "error": None,
    }


def lines_of(report: dict[str, Any]) -> list[str]:
    """Return the lines for people, of what report_of() returned."""
    ram, state, description = report["ram"], report["device_state"], report["description"]
    lines = [
        f"snapshot      {printable(report['path'])} (format {report['format_version']})",
        f"machine       {printable(report['machine'])}",
        f"RAM           {human(ram['length'])} in {len(ram['blocks'])} blocks, "
        f"{human(ram['data_bytes'])} of it not zero",
        f"device state  {state['eof_offset']} bytes to EOF, {state['size']} in all",
        "",
        *_table(
            ("block", "name", "length", "not zero", "sha256 of the chunks' xxh3-128"),
            [
                *(
                    (
                        str(block["index"]),
                        printable(block["name"]),
                        human(block["length"]),
                        human(block["data_bytes"]),
                        block["digests_sha256"],
                    )
                    for block in ram["blocks"]
                ),
                *(
                    ("-", printable(block["name"]), human(block["length"]), "-", "shared: not here")
                    for block in ram["shared_blocks"]
                ),
            ],
            right=(0, 2, 3),
        ),
        "",
    ]
    if description is None:
        lines.append("devices: not known: the source sent no description")
    elif description["error"] is not None:
        lines.append(f"devices: not known: {printable(description['error'])}")
    else:
        lines += _table(
            ("device", "instance", "version", "format"),
            [
                (
                    printable(device["name"]),
                    str(device["instance_id"]),
                    "-" if device["version"] is None else str(device["version"]),
                    "-" if device["vmsd_name"] is None else printable(device["vmsd_name"]),
                )
                for device in description["devices"]
            ],
            right=(1, 2),
        )
    lines += ["", *_digests(report)]
    if report["command"] is not None:
        line = shlex.join(report["command"]["arguments"])
        lines += ["", f"started as    {printable(line)}"]
    lines += [f"restored      {line}" for line in report["restored"]]
    if report["verified"]:
        lines += ["", "every byte agrees with its digest"]
    return lines


def _digests(report: dict[str, Any]) -> list[str]:
    files = [("config.bin", report["config"]), ("vmstate.bin", report["device_state"])]
    if report["description"] is not None:
        files.append(("vmdesc.json", report["description"]))
    return _table(
        ("file", "bytes", "sha256"),
        [(name, str(record["size"]), record["sha256"]) for name, record in files],
        right=(1,),
    )


def _table(
    head: tuple[str, ...], rows: list[tuple[str, ...]], *, right: tuple[int, ...]
) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
