# SPDX-License-Identifier: Apache-2.0
"""KVM or software emulation: KVM only where a probe has really booted this kernel with it.

/dev/kvm opens on machines whose KVM does not run a stock kernel (nested virtualization that is
not whole): the kernel hangs there, so an open device proves nothing.
"""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from labvm.host import CACHE, LabError, locked, need
from labvm.kernel import Kernel
from labvm.machine import Machine, Settings, TimedOut

PROBE_SECONDS = 20.0
RECORD = CACHE / "kvm-probe.json"


def _key(kernel: Kernel) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    qemu = subprocess.run(
        [need("qemu-system-x86_64"), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    return f"{boot} {kernel.version} {qemu}"


def _probe(kernel: Kernel, initramfs: Path) -> bool:
    with tempfile.TemporaryDirectory(prefix="probe-", dir=CACHE) as work:
        settings = Settings(
            accel="kvm",
            memory="1G",
            cpus=2,
            image=kernel.image,
            initramfs=initramfs,
            console=Path(work) / "console.log",
            host_root=False,
            append="lab.probe",
        )
        # The guest waits for these two ports before it answers.
        ports = {"out": lambda _: None, "err": lambda _: None}
        with Machine(settings, ports) as machine:
            try:
                machine.boot("probe", time.monotonic() + PROBE_SECONDS)
            except (LabError, TimedOut):
                return False
            return True


def choose(wanted: str, kernel: Kernel, initramfs: Path) -> str:
    """Return "kvm" or "tcg" for `wanted` "auto", "kvm" or "tcg"."""
    if wanted != "auto":
        return wanted
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    with locked("kvm-probe"):
        key = _key(kernel)
        try:
            record = json.loads(RECORD.read_text())
        except (OSError, ValueError):
            record = {}
        if record.get("key") != key:
            record = {"key": key, "kvm": _probe(kernel, initramfs)}
            RECORD.write_text(json.dumps(record) + "\n")
    return "kvm" if record["kvm"] else "tcg"
