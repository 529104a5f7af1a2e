# SPDX-License-Identifier: Apache-2.0
"""Live migration of virtual machines over RDMA, wire compatible with QEMU.

Importing this package loads neither libibverbs nor pyverbs: the codecs, snapshots and the
command line's ``--help`` and ``inspect`` work on any Linux machine. What needs a verbs device
is imported when it is first used, and says what to install when it is missing.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__: str


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for: reading metadata takes as long as all else."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("rdma-mig")
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
