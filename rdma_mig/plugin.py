# SPDX-License-Identifier: Apache-2.0
"""The interface for others: engines that want this transport, managers that want this engine.

A transport is found under the entry-point group ``rdma_mig.transports``, by the scheme of its URIs;
this package has ``rdma``, ``tcp``, ``unix``, ``fd``, ``exec`` and ``file``. A guest is found under
``rdma_mig.guests``; this package has ``snapshot`` and ``process``. What is imported from here stays
as it is while `API_VERSION` does. docs/plugin.md has an engine that imports nothing else.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, cast

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import DestinationTransport, SourceTransport
from rdma_mig.errors import MigrationError, RemoteProtocolError, UsageError
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import RamBlock
from rdma_mig.memory.dirty import ExplicitMarks
from rdma_mig.memory.page_stream import PageReader, PageWriter
from rdma_mig.memory.ram import GuestBlock, GuestRam
from rdma_mig.migration.engines import Process, Save
from rdma_mig.migration.handover import DestinationRefused, hand_over
from rdma_mig.migration.interfaces import (
    API_VERSION,
    DirtyTracker,
    Guest,
    Transport,
)
from rdma_mig.migration.live import LiveSource
from rdma_mig.migration.load import LiveDestination
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_BLOCK_REG,
    RAM_CONTROL_FINISH,
    RAM_CONTROL_HOOK,
    RAM_CONTROL_ROUND,
    RAM_CONTROL_SETUP,
    RAM_SAVE_CONTROL_DELAYED,
    RAM_SAVE_CONTROL_NOT_SUPP,
    acct_update_position,
    ram_control_after_iterate,
    ram_control_before_iterate,
    ram_control_load_hook,
    ram_control_save_page,
    ram_control_save_pages,
)
from rdma_mig.migration.state import Migration
from rdma_mig.migration.take_over import read_events, take_over
from rdma_mig.migration.tracking import Tracking
from rdma_mig.wire.device_state import DeviceState, decode_sole_device, encode_sole_device
from rdma_mig.wire.return_path import RETURN_PATH_PING
from rdma_mig.wire.stream import (
    CommandType,
    Hook,
    RamEnd,
    RamPart,
    RamStart,
    SectionEnd,
    StreamBlock,
    StreamHead,
    StreamParser,
    encode_command,
    encode_eos,
    encode_footer,
    encode_head,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)

__all__ = [
    "API_VERSION",
    "GUESTS",
    "RAM_CONTROL_BLOCK_REG",
    "RAM_CONTROL_FINISH",
    "RAM_CONTROL_HOOK",
    "RAM_CONTROL_ROUND",
    "RAM_CONTROL_SETUP",
    "RAM_SAVE_CONTROL_DELAYED",
    "RAM_SAVE_CONTROL_NOT_SUPP",
    "RETURN_PATH_PING",
    "TRANSPORTS",
    "CommandType",
    "DestinationRefused",
    "DestinationTransport",
    "DeviceState",
    "DirtyBitmap",
    "DirtyTracker",
    "ExplicitMarks",
    "Guest",
    "GuestBlock",
    "GuestRam",
    "Hook",
    "LiveDestination",
    "LiveSource",
    "Migration",
    "MigrationError",
    "PageReader",
    "PageWriter",
    "Process",
    "QEMUFile",
    "RamBlock",
    "RamEnd",
    "RamPart",
    "RamStart",
    "RemoteProtocolError",
    "Save",
    "SectionEnd",
    "SourceTransport",
    "StreamBlock",
    "StreamHead",
    "StreamParser",
    "Tracking",
    "Transport",
    "UsageError",
    "acct_update_position",
    "decode_sole_device",
    "encode_command",
    "encode_eos",
    "encode_footer",
    "encode_head",
    "encode_ram_start",
    "encode_section_end",
    "encode_section_part",
    "encode_sole_device",
    "find_guest",
    "find_transport",
    "hand_over",
    "ram_control_after_iterate",
    "ram_control_before_iterate",
    "ram_control_load_hook",
    "ram_control_save_page",
    "ram_control_save_pages",
    "read_events",
    "take_over",
]

TRANSPORTS = "rdma_mig.transports"
"""Entry-point group of transports: each names a class that is made without arguments."""

GUESTS = "rdma_mig.guests"
"""Entry-point group of guests: each names a class; its arguments are its own matter."""


def find_transport(scheme: str) -> Transport:
    """Return the installed transport for a URI's scheme, such as ``rdma``.

    Raises:
        UsageError: there is none, or it was written for another version of this interface.
    """
    return cast(Transport, _find(TRANSPORTS, scheme)())


def find_guest(name: str) -> type[Guest]:
    """Return an installed class of guests, such as ``snapshot``.

    Raises:
        UsageError: there is none, or it was written for another version of this interface.
    """
    return cast(type[Guest], _find(GUESTS, name))


def _find(group: str, name: str) -> Any:
    installed = entry_points(group=group)
    found = [entry for entry in installed if entry.name == name]
    if not found:
        names = ", ".join(sorted(installed.names)) or "none"
        raise UsageError(f"no {name!r} is installed in {group}; there are: {names}")
    loaded = found[0].load()
    version = getattr(loaded, "api_version", None)
    if version != API_VERSION:
        raise UsageError(
            f"{found[0].value} was written for version {version} of rdma_mig.plugin, "
            f"this is {API_VERSION}",
            remedy="install versions of the two that fit",
        )
    return loaded
