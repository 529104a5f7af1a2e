# SPDX-License-Identifier: Apache-2.0
"""What this host has of RDMA, and one clear line for what it lacks.

Read from sysfs and by opening device files, before librdmacm or libibverbs are asked: their
errors name neither the thing that is missing nor the command that mends it.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

from rdma_mig.errors import HostError

__all__ = [
    "devices",
    "explain_registration",
    "port_state",
    "require_lockable",
    "require_rdma",
    "unusable_devices",
]

_CLASS = Path("/sys/class/infiniband")
_DEV = Path("/dev/infiniband")
_CM = _DEV / "rdma_cm"

_CAP_IPC_LOCK = 14  # capabilities(7): with it RLIMIT_MEMLOCK does not count
_RAISE_LIMIT = (
    "raise the limit: ulimit -l unlimited (LimitMEMLOCK=infinity in a systemd unit, memlock in "
    "/etc/security/limits.conf), or give it CAP_IPC_LOCK"
)


def devices() -> list[str]:
    """Return the names of this host's verbs devices, sorted."""
    try:
        return sorted(entry.name for entry in _CLASS.iterdir())
    except OSError:
        return []


def port_state(device: str, port: int) -> str:
    """Return what the kernel says of a port: ACTIVE, DOWN, INIT, ARMED; UNKNOWN for none."""
    try:
        state = (_CLASS / device / "ports" / str(port) / "state").read_text()
    except OSError:
        return "UNKNOWN"
    return state.partition(":")[2].strip()


def _require_access(path: Path, missing_remedy: str) -> None:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise HostError(f"{path} does not exist", remedy=missing_remedy) from None
    except PermissionError:
        raise HostError(
            f"{path} may not be opened by user {os.getuid()}",
            remedy=f'chmod 0666 {path} (udev rule: KERNEL=="{path.name}", MODE="0666"), or run '
            "as a user who may open it",
        ) from None
    except OSError as error:
        # The device can be opened by somebody, or fails in a way that libibverbs will meet again.
        if error.errno not in (errno.EBUSY, errno.ENXIO, errno.ENODEV):
            return
        raise HostError(
            f"{path} cannot be opened: {error.strerror}", remedy=missing_remedy
        ) from None


def _uverbs(device: str) -> Path | None:
    for entry in sorted(Path("/sys/class/infiniband_verbs").glob("uverbs*")):
        try:
            if (entry / "ibdev").read_text().strip() == device:
                return _DEV / entry.name
        except OSError:
            continue
    return None


def require_rdma() -> None:
    """Make sure that this host has a verbs device that this process may use.

    Raises:
        HostError: there is no device, its device files are missing, or they may not be opened.
    """
    names = devices()
    if not names:
        raise HostError(
            "this host has no RDMA device",
            remedy="load the adapter's driver, or make a soft-RoCE device: modprobe rdma_rxe && "
            "rdma link add rxe0 type rxe netdev INTERFACE",
        )
    _require_access(_CM, "modprobe rdma_ucm")
    failures = unusable_devices()
    if len(failures) == len(names):
        raise failures[-1]


def unusable_devices() -> list[HostError]:
    """Return why devices of this host cannot be used by this process, one error for each."""
    failures = []
    for name in devices():
        path = _uverbs(name)
        try:
            if path is None:
                raise HostError(f"device {name} has no file in {_DEV}", remedy="modprobe ib_uverbs")
            _require_access(path, "modprobe ib_uverbs")
        except HostError as error:
            failures.append(error)
    return failures


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def require_lockable(size: int, what: str) -> None:
    """Make sure that this process may pin ``size`` bytes, before anything irreversible is done.

    The kernel counts registered memory against RLIMIT_MEMLOCK unless the process has
    CAP_IPC_LOCK. It has the last word: a registration may still fail.

    Raises:
        HostError: the limit is lower; ``what`` names the memory.
    """
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or size <= soft:
        return
    with open("/proc/self/status", encoding="ascii") as lines:
        effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    if int(effective, 16) >> _CAP_IPC_LOCK & 1:
        return
    raise HostError(
        f"{_mib(size)} of {what} would have to be pinned, and this process may lock "
        f"{_mib(soft)} of memory",
        remedy=_RAISE_LIMIT,
    )


def explain_registration(error: OSError, length: int, what: str) -> HostError:
    """Turn a failed ibv_reg_mr() of ``length`` bytes into the error to raise.

    Args:
        error: what registration raised.
        length: bytes that were to be pinned.
        what: the memory's name, for the message.
    """
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EPERM):
        if soft != resource.RLIM_INFINITY:
            return HostError(
                f"{_mib(length)} of {what} cannot be pinned: {error.strerror or error}; this "
                f"process may lock {_mib(soft)} of memory",
                remedy=_RAISE_LIMIT,
            )
        return HostError(
            f"{_mib(length)} of {what} cannot be pinned: {error.strerror or error}",
            remedy="free memory on this host (grep MemAvailable /proc/meminfo)",
        )
    return HostError(
        f"{_mib(length)} of {what} cannot be registered: {error.strerror or error}",
        remedy="see the device's limits: ibv_devinfo -v (max_mr, max_mr_size)",
    )
