# SPDX-License-Identifier: Apache-2.0
"""The kernel's part in RDMA: what user space talks to, whichever adapter there is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rdma_mig.host.findings import Finding, Level

__all__ = ["modules"]

# Built in or loaded, each of them shows itself here.
_SHOWN = {
    "ib_uverbs": Path("/sys/class/infiniband_verbs"),
    "rdma_ucm": Path("/sys/class/misc/rdma_cm"),
}
_INSTALL = (
    "boot a kernel that has them: apt-get install linux-image-amd64 (the cloud image has no RDMA); "
    "in a container, load them on its host"
)


def modules() -> Iterator[Finding]:
    """Whether the kernel has the modules behind /dev/infiniband: verbs, and connecting."""
    missing = [name for name, shown in _SHOWN.items() if not shown.exists()]
    if not missing:
        yield Finding("modules", Level.OK, f"the kernel has {' and '.join(_SHOWN)}")
        return
    release = os.uname().release
    found = _installed(Path("/lib/modules", release))
    yield Finding(
        "modules",
        Level.BLOCKER,
        f"the kernel runs without {' and '.join(missing)}"
        + ("" if found.issuperset(missing) else f", and {release} has no such module here"),
        f"modprobe -a {' '.join(missing)}" if found.issuperset(missing) else _INSTALL,
    )


def _installed(directory: Path) -> set[str]:
    """Names of the modules that were installed for a kernel."""
    with contextlib.suppress(OSError, UnicodeError):
        lines = (directory / "modules.dep").read_text(encoding="utf-8").splitlines()
        paths = (line.partition(":")[0] for line in lines)
        return {path.rpartition("/")[2].partition(".")[0].replace("-", "_") for path in paths}
    return set()
