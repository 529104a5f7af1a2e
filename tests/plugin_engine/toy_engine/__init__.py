# SPDX-License-Identifier: Apache-2.0
"""An engine and a guest that know nothing of rdma-mig but ``rdma_mig.plugin``."""
