# SPDX-License-Identifier: Apache-2.0
"""Live migration of virtual machines over RDMA, wire compatible with QEMU.

Importing this package loads neither libibverbs nor pyverbs: the codecs, snapshots and the
command line's ``--help`` and ``inspect`` work on any Linux machine. What needs a verbs device
is imported when it is first used, and says what to install when it is missing.
"""

from __future__ import annotations

from importlib import metadata

__all__ = ["__version__"]

try:
    __version__: str = metadata.version("rdma-mig")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
