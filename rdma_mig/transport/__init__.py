# SPDX-License-Identifier: Apache-2.0
"""The RDMA migration protocol over verbs, both ends."""
