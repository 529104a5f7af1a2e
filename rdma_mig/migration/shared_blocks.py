# SPDX-License-Identifier: Apache-2.0
"""Which RAM blocks of a source with x-ignore-shared stay where they are.

Such a source lists all of its RAM blocks and sends the ones that it does not share with others; the
stream does not say which those are (docs/protocol.md, x-ignore-shared). So the operator says it, or
it is guessed from the names that QEMU gives to blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rdma_mig.errors import UsageError
from rdma_mig.wire.stream import CAPABILITY_IGNORE_SHARED, Capabilities, StreamBlock, StreamHead

__all__ = ["NO_SHARED_BLOCKS", "SharedBlocks", "choose_shared"]

NO_SHARED_BLOCKS = "none"
"""What stands for no block at all where the names of shared blocks are asked for."""

# Memory that comes from an object of its own: the object's path, or what libvirt calls the objects.
_BACKENDS = re.compile(r"/objects/.+|ram-node\d+")


@dataclass(frozen=True, slots=True)
class SharedBlocks:
    """The blocks that are taken as shared.

    Attributes:
        names: theirs; none where x-ignore-shared is off.
        guessed: nobody said so.
        asked: x-ignore-shared is on, so that there was something to decide.
        warning: what the operator should know; empty where there is nothing.
    """

    names: frozenset[str] = frozenset()
    guessed: bool = False
    asked: bool = False
    warning: str = ""

    @property
    def remedy(self) -> str:
        """What to do when the source ends the connection after it was told which blocks we took."""
        taken = ", ".join(sorted(self.names)) or "no block"
        return (
            f"the source has x-ignore-shared on, and {taken} was taken as shared "
            f"({'a guess' if self.guessed else 'as named'}): if that is wrong, name the blocks "
            f"that are with --shared-block NAME, or --shared-block {NO_SHARED_BLOCKS}"
        )


def announces_ignore_shared(head: StreamHead) -> bool:
    """Whether the source says that it has x-ignore-shared on."""
    return any(
        isinstance(section, Capabilities) and CAPABILITY_IGNORE_SHARED in section.names
        for section in head.subsections
    )


def choose_shared(
    head: StreamHead, blocks: Sequence[StreamBlock], named: Sequence[str] | None
) -> SharedBlocks:
    """Decide which of the listed blocks the source keeps to itself.

    Args:
        head: of the stream; tells whether x-ignore-shared is on.
        blocks: all that the source lists.
        named: what the operator said, `NO_SHARED_BLOCKS` alone for none; None to guess: the blocks
            that belong to memory backends, or else the longest one, which is the main RAM.

    Raises:
        UsageError: a name that the source does not list, or no block would be left to receive.
    """
    listed = [block.idstr for block in blocks]
    if not announces_ignore_shared(head):
        if named and list(named) != [NO_SHARED_BLOCKS]:
            return SharedBlocks(
                warning=f"--shared-block {' '.join(named)} is without effect: the source does not "
                "announce x-ignore-shared, and sends all of its RAM"
            )
        return SharedBlocks()
    guessed = named is None
    if named is not None:
        names = [] if list(named) == [NO_SHARED_BLOCKS] else list(named)
        for name in names:
            if name not in listed:
                raise UsageError(
                    f"--shared-block {name}: the source lists no such RAM block",
                    remedy=f"it lists {', '.join(listed)}",
                )
    else:
        names = [name for name in listed if _BACKENDS.fullmatch(name)]
        names = names or [max(blocks, key=lambda block: block.length).idstr]
    if len(set(names)) == len(listed):
        raise UsageError(
            "all RAM blocks of the source would be taken as shared, and none received",
            remedy="name the ones that are with --shared-block NAME",
        )
    warning = ""
    if names:
        warning = (
            f"x-ignore-shared is on at the source: {', '.join(names)} "
            f"{'is' if len(names) == 1 else 'are'} {'taken as' if guessed else ''} shared, and "
            "not in the snapshot; keep that memory as it is when the source stops"
        ).replace("  ", " ")
    return SharedBlocks(frozenset(names), guessed, True, warning)
