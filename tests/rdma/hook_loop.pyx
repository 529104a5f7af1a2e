# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""An engine's loop over pages, in Cython: what rdma_hook_cost.py times."""

from libc.stdint cimport uint64_t

from rdma_mig._hooks cimport PageTaker


def save(file, uint64_t block_offset, uint64_t first, uint64_t pages):
    """Offer pages of 4096 bytes one by one, from an offset on."""
    cdef PageTaker taker = file.page_taker
    cdef uint64_t page
    for page in range(pages):
        taker.take(block_offset, first + page * 4096, 4096)
