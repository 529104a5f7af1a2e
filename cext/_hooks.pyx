# SPDX-License-Identifier: Apache-2.0
"""ram_control_save_page(): called for every page, so without a Python frame of its own."""

from libc.stdint cimport uint64_t


cdef class PageTaker:
    """What takes pages one by one, for a phase that has begun; the base of a transport's own.

    A file has one in ``page_taker`` while its transport takes pages by this, which a Cython engine
    can call without any Python (rdma_mig/_hooks.pxd). A transport derives a class that has take().
    """

    def __cinit__(self):
        if type(self) is PageTaker:
            raise TypeError("a PageTaker takes no pages by itself: derive a class that has take()")

    cdef int take(self, uint64_t block_offset, uint64_t offset, uint64_t size) except -1:
        """Take one page of the block that begins at ``block_offset`` of the RAM address space.

        ValueError when there is no such page, or no phase.
        """
        raise TypeError(f"{type(self).__name__} has no take()")

    def offer(self, uint64_t block_offset, uint64_t offset, uint64_t size) -> None:
        """take(), for Python."""
        self.take(block_offset, offset, size)


def ram_control_save_page(f, block_offset, offset, size, bytes_sent=None):
    """Offer one page to the transport.

    Args:
        f: the file being saved to.
        block_offset: where the page's block begins in the RAM address space.
        offset: of the page in its block, bytes.
        size: bytes.
        bytes_sent: its ``value`` becomes 1 when the page was taken, whatever is sent later,
            since sending is deferred: the caller adds it to ``transferred`` (docs/protocol.md, RAM
            phases).

    Returns:
        RAM_SAVE_CONTROL_DELAYED: taken. RAM_SAVE_CONTROL_NOT_SUPP: put it into the stream.

    Raises:
        MigrationError: it failed, now or before; the file keeps the error.
    """
    taker = f.page_taker
    if taker is None:
        if not f.offer_page(block_offset, offset, size):
            return _NOT_SUPP
    else:
        try:
            (<PageTaker?> taker).take(block_offset, offset, size)
        except Exception as error:
            raise f.failed(error) from error
    if bytes_sent is not None:
        bytes_sent.value = 1
    return _DELAYED


# The header's values, as objects that are made once.
cdef object _NOT_SUPP = -1000
cdef object _DELAYED = -2000
