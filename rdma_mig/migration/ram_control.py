# SPDX-License-Identifier: Apache-2.0
"""The RAM hooks of migration.h, for any migration file.

On a file without hooks they do nothing, or say that they are not supported. Failures raise, set
the file's error, and are raised again by later calls. Names and values are the header's; those of
the ``RAM_CONTROL_*`` flags are listed in docs/protocol.md, RAM phases.
"""

from __future__ import annotations

from rdma_mig._hooks import ram_control_save_page
from rdma_mig.channel.qemufile import BytesSent, QEMUFile
from rdma_mig.errors import MigrationError, RemoteProtocolError
from rdma_mig.memory.bitmap import DirtyBitmap
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE

__all__ = [
    "RAM_CONTROL_BLOCK_REG",
    "RAM_CONTROL_FINISH",
    "RAM_CONTROL_HOOK",
    "RAM_CONTROL_ROUND",
    "RAM_CONTROL_SETUP",
    "RAM_SAVE_CONTROL_DELAYED",
    "RAM_SAVE_CONTROL_NOT_SUPP",
    "acct_update_position",
    "ram_control_after_iterate",
    "ram_control_before_iterate",
    "ram_control_load_hook",
    "ram_control_save_page",
    "ram_control_save_pages",
]

RAM_CONTROL_SETUP = 0
RAM_CONTROL_ROUND = 1
RAM_CONTROL_HOOK = 2
RAM_CONTROL_FINISH = 3
RAM_CONTROL_BLOCK_REG = 4

RAM_SAVE_CONTROL_NOT_SUPP = -1000
RAM_SAVE_CONTROL_DELAYED = -2000


def acct_update_position(f: QEMUFile, size: int, zero: bool) -> None:
    """Account a run of pages when it is issued, which may be long after the pages were offered.

    The transport calls it for its runs by itself; an engine does for what it puts into the stream.

    Args:
        f: the file being saved to; its ``counters`` are what is updated.
        size: bytes of the run, whole pages of 4096.
        zero: the run is announced as zero: its pages count as duplicates. Otherwise they count as
            normal, and ``transferred`` and the file's position advance by ``size``.
    """
    f.account(size, zero=zero)


def ram_control_before_iterate(f: QEMUFile, flags: int) -> None:
    """Begin a RAM phase: SETUP, a ROUND, or FINISH; before its first page."""
    f.check()
    if f.hooks is not None:
        try:
            f.hooks.before_iterate(f, flags)
        except (MigrationError, ValueError) as error:
            raise f.failed(error) from error


def ram_control_after_iterate(f: QEMUFile, flags: int) -> None:
    """End a RAM phase, before its EOS word is put; on return all its pages have been sent."""
    f.check()
    if f.hooks is not None:
        try:
            f.hooks.after_iterate(f, flags)
        except (MigrationError, ValueError) as error:
            raise f.failed(error) from error


def ram_control_load_hook(f: QEMUFile, flags: int, data: object = None) -> None:
    """Tell the transport what the stream showed, at the destination.

    Args:
        f: the file being loaded.
        flags: RAM_CONTROL_HOOK where the stream has RAM_SAVE_FLAG_HOOK; RAM_CONTROL_BLOCK_REG
            with the block's name for each listed block.
        data: the name, for BLOCK_REG.

    Raises:
        RemoteProtocolError: HOOK on a file without hooks: the source sends RAM by a transport that
            this is not. BLOCK_REG is ignored there.
    """
    f.check()
    if f.hooks is None:
        if flags == RAM_CONTROL_HOOK:
            raise f.failed(
                RemoteProtocolError(
                    "the stream asks for RDMA, and this migration does not run over RDMA"
                )
            )
        return
    try:
        f.hooks.load_hook(f, flags, data)
    except (MigrationError, ValueError) as error:
        raise f.failed(error) from error


def ram_control_save_pages(
    f: QEMUFile,
    block_offset: int,
    dirty: DirtyBitmap | None = None,
    bytes_sent: BytesSent | None = None,
) -> int:
    """Offer all dirty pages of a block at once: the bulk twin of ram_control_save_page().

    Args:
        f: the file being saved to.
        block_offset: where the block begins in the RAM address space.
        dirty: its dirty pages; None for the whole block.
        bytes_sent: its ``value`` becomes the number of pages taken: 1 for each, as there.

    Returns:
        RAM_SAVE_CONTROL_DELAYED: taken. RAM_SAVE_CONTROL_NOT_SUPP: put them into the stream.
    """
    f.check()
    if f.hooks is None:
        return RAM_SAVE_CONTROL_NOT_SUPP
    try:
        taken = f.hooks.save_pages(block_offset, dirty)
    except (MigrationError, ValueError) as error:
        raise f.failed(error) from error
    if bytes_sent is not None:
        bytes_sent.value = taken // TARGET_PAGE_SIZE
    return RAM_SAVE_CONTROL_DELAYED
