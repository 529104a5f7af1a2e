# SPDX-License-Identifier: Apache-2.0
"""Which clients a destination serves."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from rdma_mig.migration.events import Warned
from rdma_mig.migration.state import Migration

__all__ = ["client_guard", "warn_if_open"]


def client_guard(migration: Migration, allow: tuple[str, ...]) -> Callable[[str], str] | None:
    """Return what decides which clients are served; None where all are."""
    if not allow:
        return None
    networks = [ipaddress.ip_network(network, strict=False) for network in allow]

    def guard(host: str) -> str:
        address = ipaddress.ip_address(host.partition("%")[0])
        if any(address in network for network in networks):
            return ""
        migration.emit(Warned(f"turned {host} away: --allow does not name it"))
        return "this destination does not take migrations from your address (--allow)"

    return guard


def warn_if_open(migration: Migration, host: str) -> None:
    """Warn of a listener at every address of this host, which serves everybody."""
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        migration.emit(
            Warned(
                "whoever reaches this host can send a machine, and guest RAM crosses the "
                "wire in clear: listen at an address of a trusted network, or name the source "
                "(--allow)"
            )
        )
