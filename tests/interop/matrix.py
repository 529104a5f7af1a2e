# SPDX-License-Identifier: Apache-2.0
"""What the round trips are made of, and how a cell of that matrix is called."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

from support import MIB

PAGE = 4096

#: How RAM is registered: all of it at the start, or chunk by chunk.
MODES = ("pin-all", "dynamic")
#: What the guest does.
KINDS = ("paused", "idle", "dirtying")


class Machine(NamedTuple):
    """A QEMU machine, and the blocks that its RAM is made of."""

    type: str
    blocks: Callable[[int], dict[str, int]]
    """Names and sizes, bytes, of the blocks of a guest of so many bytes."""


def _two_nodes(size: int) -> dict[str, int]:
    """Two blocks of which neither ends with a chunk.

    The border lies within what a dirtying guest writes, and is no multiple of 8 KiB.
    """
    first = 20 * MIB + 3 * PAGE
    return {"node0": first, "node1": size - first + 2 * PAGE}


#: The last chunk of RAM is a whole one on the first machine only.
MACHINES = {
    "pc": Machine("pc", lambda size: {"pc.ram": size}),
    "q35": Machine("q35", lambda size: {"pc.ram": size + 2 * PAGE}),
    "numa": Machine("pc", _two_nodes),
}

#: Every value of every dimension.
DIMENSIONS = (MODES, tuple(MACHINES), KINDS)


def cells() -> list[tuple[str, ...]]:
    """All combinations of mode, machine and kind."""
    return list(itertools.product(*DIMENSIONS))


def pairs(chosen: list[tuple[str, ...]]) -> set[tuple[str, str]]:
    """The pairs of values that occur together in a choice of cells."""
    return {pair for cell in chosen for pair in itertools.combinations(cell, 2)}
