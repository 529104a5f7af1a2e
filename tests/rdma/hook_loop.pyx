# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""An engine in Cython, whose loop rdma_hook_cost.py times; and transports that its pages go to."""

from libc.stdint cimport uint64_t

from rdma_mig._hooks cimport PageTaker

from rdma_mig.migration.ram_control import RAM_SAVE_CONTROL_DELAYED, ram_control_save_page


cdef class Listing(PageTaker):
    """Lists what it is offered, below a limit."""

    cdef readonly list pages
    cdef uint64_t limit

    def __init__(self, uint64_t limit):
        self.pages = []
        self.limit = limit

    cdef int take(self, uint64_t block_offset, uint64_t offset, uint64_t size) except -1:
        if offset >= self.limit:
            raise ValueError("there is no such page")
        self.pages.append((block_offset, offset, size))
        return 0


cdef class Nothing(PageTaker):
    """Forgot its take()."""


def save(file, uint64_t block_offset, uint64_t first, uint64_t pages):
    """Offer pages of 4096 bytes one by one, from an offset on; return whether they were taken.

    Where there is no taker, the one call that there always is says what becomes of a page.
    """
    cdef PageTaker taker = file.page_taker
    cdef uint64_t page
    if taker is None:
        return all(
            ram_control_save_page(file, block_offset, first + page * 4096, 4096)
            == RAM_SAVE_CONTROL_DELAYED
            for page in range(pages)
        )
    for page in range(pages):
        taker.take(block_offset, first + page * 4096, 4096)
    return True
