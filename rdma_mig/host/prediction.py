# SPDX-License-Identifier: Apache-2.0
"""How long a migration will take, from what was measured of two hosts and the path between them.

Arithmetic only: a first pass carries all RAM, each later one what the guest has written
meanwhile, and the guest is stopped when the rest fits into the downtime allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

from rdma_mig.errors import LocalProtocolError

__all__ = ["Path", "Prediction", "advise", "predict"]

# Passes behind which a migration counts as one that does not converge.
_PASSES_MAX = 100


@dataclass(frozen=True, slots=True)
class Path:
    """What was measured of one way to migrate.

    Attributes:
        name: ``RDMA`` or ``TCP``.
        bytes_per_second: RAM moved, once memory is prepared.
        setup_seconds_per_byte: preparing memory at both ends, as far as one waits for it.
        handover_seconds: from the last byte of RAM to the destination's word.
    """

    name: str
    bytes_per_second: float
    setup_seconds_per_byte: float = 0.0
    handover_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0:
            raise LocalProtocolError(f"a rate of {self.bytes_per_second} bytes/s")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is expected of a migration.

    Attributes:
        path: over which way.
        converges: whether the guest can be stopped within the downtime allowed, by itself.
        total_seconds: from the connection to the end; where it does not converge, with the guest
            stopped after the first pass that brings it no nearer.
        setup_seconds: of it, preparing memory.
        downtime_seconds: the guest at rest.
        passes: over RAM, the last one included.
    """

    path: str
    converges: bool
    total_seconds: float
    setup_seconds: float
    downtime_seconds: float
    passes: int


def predict(path: Path, ram: int, dirty_rate: float, downtime_seconds: float) -> Prediction:
    """Run the model.

    Args:
        path: measured.
        ram: bytes of the guest's RAM, all of it in use.
        dirty_rate: bytes a second that the guest writes, in pages; it never has more than all RAM
            to send.
        downtime_seconds: that the guest may rest.
    """
    setup = ram * path.setup_seconds_per_byte
    total, pending, passes = setup, float(ram), 0
    allowed = max(downtime_seconds - path.handover_seconds, 0.0) * path.bytes_per_second
    while True:
        passes += 1
        seconds = pending / path.bytes_per_second
        if not dirty_rate:
            # A guest that writes nothing is stopped when the first pass is through.
            return Prediction(
                path.name, True, total + seconds + path.handover_seconds, setup,
                path.handover_seconds, passes,
            )  # fmt: skip
        total += seconds
        left = min(dirty_rate * seconds, float(ram))
        stuck = left >= pending or passes == _PASSES_MAX
        if left <= allowed or stuck:
            rest = left / path.bytes_per_second + path.handover_seconds
            return Prediction(path.name, left <= allowed, total + rest, setup, rest, passes + 1)
        pending = left


def advise(rdma: Prediction, tcp: Prediction) -> str:
    """Say in one sentence which of the two to take."""
    if rdma.converges != tcp.converges:
        better, worse = (rdma, tcp) if rdma.converges else (tcp, rdma)
        return (
            f"{better.path}: it converges, with {better.downtime_seconds * 1000:.0f} ms of "
            f"downtime, and {worse.path} does not"
        )
    if not rdma.converges:
        return (
            "neither converges by itself: the guest writes faster than either carries; allow "
            "more downtime, or slow it down (auto-converge)"
        )
    better, worse = sorted((rdma, tcp), key=lambda one: one.total_seconds)
    return (
        f"{better.path}: {better.total_seconds:.2f} s in all against {worse.total_seconds:.2f} s "
        f"over {worse.path}, {better.downtime_seconds * 1000:.0f} ms of downtime against "
        f"{worse.downtime_seconds * 1000:.0f} ms"
    )
