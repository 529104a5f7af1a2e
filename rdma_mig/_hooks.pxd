# SPDX-License-Identifier: Apache-2.0
# For engines written in Cython:
#
#     from rdma_mig._hooks cimport PageTaker
#     cdef PageTaker taker = file.page_taker      # of the QEMUFile; None: ram_control_save_page()
#     taker.take(block_offset, offset, size)

from libc.stdint cimport uint64_t


cdef class PageTaker:
    cdef int take(self, uint64_t block_offset, uint64_t offset, uint64_t size) except -1
