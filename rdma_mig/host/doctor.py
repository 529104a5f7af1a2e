# SPDX-License-Identifier: Apache-2.0
"""All that is looked at on a host, in the order in which it is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from rdma_mig.host import adapters, machine
from rdma_mig.host.findings import Finding, Report
from rdma_mig.host.modules import modules

__all__ = ["examine"]


def examine(*, ram: int | None = None, device: str | None = None, qmp: str | None = None) -> Report:
    """Look at this host.

    Args:
        ram: bytes of the guest that is to migrate; None to tell what there is.
        device: the only device that counts; None for all.
        qmp: path of a QEMU's QMP socket, whose settings are looked at as well.
    """
    return Report(socket.gethostname(), tuple(_findings(ram, device, qmp)))


def _findings(ram: int | None, device: str | None, qmp: str | None) -> Iterator[Finding]:
    yield from machine.kernel()
    yield from modules()
    yield from adapters.libraries()
    yield from adapters.access()
    yield from adapters.adapters(device, ram)
    yield from machine.memory(ram)
    yield from machine.locked_memory(ram)
    yield from machine.huge_pages()
    yield from machine.dirty_tracking()
    if qmp is not None:
        from rdma_mig.host.monitor import settings

        yield from settings(qmp)
