# SPDX-License-Identifier: Apache-2.0
"""What a running QEMU is set to, asked over its QMP socket with the qemu.qmp library."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from rdma_mig.host.findings import Finding, Level

__all__ = ["settings"]

_SECONDS = 10.0
# 128 MiB/s, what QEMU takes unless it is told otherwise.
_DEFAULT_BANDWIDTH = 128 << 20
_CAPABILITY = (
    'migrate-set-capabilities {{"capabilities": [{{"capability": "{}", "state": {}}}]}} (HMP: '
    "migrate_set_capability {} {})"
)


def settings(path: str) -> Iterator[Finding]:
    """Look at the QEMU behind a QMP socket; a finding says so where it cannot be asked."""
    try:
        from qemu.qmp import QMPClient, QMPError
    except ImportError:
        yield Finding(
            "qemu",
            Level.WARNING,
            "asking a QEMU needs the library qemu.qmp",
            "pip install qemu.qmp",
        )
        return

    async def ask() -> tuple[Any, Any, Any, Any]:
        client = QMPClient("rdma-migrate doctor")
        await client.connect(path)
        try:
            return (
                await client.execute("query-version"),
                await client.execute("query-status"),
                await client.execute("query-migrate-capabilities"),
                await client.execute("query-migrate-parameters"),
            )
        finally:
            await client.disconnect()

    try:
        version, status, capabilities, parameters = asyncio.run(
            asyncio.wait_for(ask(), timeout=_SECONDS)
        )
    except (OSError, QMPError, TimeoutError) as error:
        why = str(error) or type(error).__name__
        yield Finding(
            "qemu",
            Level.BLOCKER,
            f"the QEMU at {path} cannot be asked: {why}",
            "start it with -qmp unix:PATH,server=on,wait=off, and name that path; a QMP socket "
            "serves one client at a time",
        )
        return
    number = version["qemu"]
    release = (int(number["major"]), int(number["minor"]))
    yield Finding(
        "qemu",
        Level.OK,
        f"QEMU {release[0]}.{release[1]}.{number['micro']}, its machine is {status['status']}",
    )
    on = {entry["capability"] for entry in capabilities if entry["state"]}
    yield from _capabilities(on, release)
    bandwidth = int(parameters.get("max-bandwidth", 0))
    slow = bandwidth == _DEFAULT_BANDWIDTH
    yield Finding(
        "max-bandwidth",
        Level.WARNING if slow else Level.OK,
        f"max-bandwidth is {bandwidth >> 20} MiB/s" + (", QEMU's default" if slow else ""),
        'migrate-set-parameters {"max-bandwidth": 100000000000} (HMP: migrate_set_parameter '
        "max-bandwidth 100G)"
        if slow
        else "",
    )


def _capabilities(on: set[str], release: tuple[int, int]) -> Iterator[Finding]:
    def finding(name: str, level: Level, message: str, state: bool) -> Finding:
        word = "on" if state else "off"
        remedy = _CAPABILITY.format(name, str(state).lower(), name, word)
        return Finding("capability", level, message, remedy)

    for name in ("multifd", "xbzrle", "compress", "x-colo"):
        if name in on:
            yield finding(
                name, Level.BLOCKER, f"capability {name} is on, which RDMA does not carry", False
            )
    if "return-path" in on and "postcopy-ram" not in on and release < (8, 0):
        yield finding(
            "return-path",
            Level.BLOCKER,
            "capability return-path is on without postcopy-ram, with which a QEMU up to 7.2 fails "
            "over RDMA",
            False,
        )
    safe = "postcopy-ram" in on if release < (8, 0) else "return-path" in on
    if not safe:
        name = "postcopy-ram" if release < (8, 0) else "return-path"
        yield finding(
            name,
            Level.OK,
            "there is no return path: the source lets go of its guest before the destination says "
            "that it has it; safer with one",
            True,
        )
    pinned = "rdma-pin-all" in on
    yield finding(
        "rdma-pin-all",
        Level.OK,
        "RAM is pinned all at once (rdma-pin-all)"
        if pinned
        else "RAM is pinned chunk by chunk as it is used, which is slower (rdma-pin-all is off)",
        not pinned,
    )
