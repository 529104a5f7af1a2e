# SPDX-License-Identifier: Apache-2.0
"""Loads the RDMA layer on first use, and says what is missing where it cannot be loaded."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

from rdma_mig.errors import HostError

__all__ = ["load"]

_INSTALL = "install it: apt-get install python3-pyverbs ibverbs-providers rdma-core"


@functools.cache
def load() -> ModuleType:
    """Import rdma_mig._verbs, and with it pyverbs and the RDMA libraries.

    Returns:
        the Cython layer; it does not change from one call to the next.

    Raises:
        HostError: pyverbs, libibverbs, librdmacm or the layer itself is not there, or they do not
            fit each other. The message names the thing, the remedy the command.
    """
    # pyverbs calls logging.basicConfig() when it is imported. Whether there is a root handler is
    # the application's choice, so the choice is put back.
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        try:
            import pyverbs.base  # noqa: F401
        except ModuleNotFoundError:
            raise HostError(
                "pyverbs, the Python binding of libibverbs, is not installed for this Python",
                remedy=f"{_INSTALL}; a virtual environment needs --system-site-packages",
            ) from None
        except ImportError as error:
            raise HostError(f"pyverbs cannot be loaded ({error})", remedy=_INSTALL) from None
        try:
            # All that a connection needs: loading it later would be part of the migration's time.
            from pyverbs import cmid, cq, device, pd, qp  # noqa: F401

            from rdma_mig import _verbs
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("pyverbs"):
                raise HostError(f"pyverbs is incomplete ({error})", remedy=_INSTALL) from None
            raise HostError(
                "this rdma-mig was built without its RDMA layer",
                remedy="apt-get install libibverbs-dev librdmacm-dev pkg-config, then install "
                "rdma-mig again with --config-settings=setup-args=-Dverbs=enabled",
            ) from None
        except (ImportError, ValueError) as error:
            # ValueError: modules of pyverbs that were built for different versions of each other.
            raise HostError(f"the RDMA layer cannot be loaded ({error})", remedy=_INSTALL) from None
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return _verbs
