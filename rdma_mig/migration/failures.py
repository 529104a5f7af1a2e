# SPDX-License-Identifier: Apache-2.0
"""What a failure owes the operator: who it came from, and what to do."""

from __future__ import annotations

from rdma_mig.errors import MigrationError, PeerGone, RemoteProtocolError

__all__ = ["complete_failure"]


def complete_failure(error: MigrationError, peer: str, other: str) -> None:
    """See to it that a failure which the other end has to do with names it, and says what to do.

    Args:
        error: what is on its way to the operator.
        peer: the other end, HOST:PORT where it has an address.
        other: what the other end is.
    """
    if not isinstance(error, (PeerGone, RemoteProtocolError)):
        return
    # Codecs know bytes and not whose: and a return path has another port.
    if peer.rpartition(":")[0] not in error.message:
        error.message = f"from {peer}: {error.message}"
    if not error.remedy and isinstance(error, PeerGone):
        error.remedy = f"see what the {other} says of it, mend that and migrate again"
    elif not error.remedy:
        error.remedy = (
            f"make sure that the {other} is a QEMU or an rdma-migrate, see its messages and its "
            "version, and migrate again"
        )
