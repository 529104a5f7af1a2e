# SPDX-License-Identifier: Apache-2.0
# For engines written in Cython:
#
#     from rdma_mig._hooks cimport PageTaker
#     cdef PageTaker taker = file.page_taker      # of the QEMUFile
#     if taker is None:
#         ...                                     # as ram_control_save_page() says
#     taker.take(block_offset, offset, size)
#
# A call on None is not caught: Cython does not look.

from libc.stdint cimport uint64_t


cdef class PageTaker:
    cdef int take(self, uint64_t block_offset, uint64_t offset, uint64_t size) except -1
