# SPDX-License-Identifier: Apache-2.0
"""The rdma-migrate command; one module a sub-command."""
