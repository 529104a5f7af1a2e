# SPDX-License-Identifier: Apache-2.0
"""The initramfs: busybox, the modules in the order to load them, the guest's scripts, the job."""

import stat
from pathlib import Path

from labvm.host import need
from labvm.kernel import Kernel

GUEST = Path(__file__).resolve().parent / "guest"
MODULE_DIRECTORY = "modules"


class Archive:
    """A cpio archive in the "newc" format, which the kernel unpacks into its first root."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def _add(self, name: str, mode: int, content: bytes = b"") -> None:
        fields = (len(self._names) + 1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0)
        raw = name.encode() + b"\0"
        header = b"070701" + b"".join(b"%08X" % field for field in (*fields, len(raw), 0)) + raw
        self._parts += [header, b"\0" * (-len(header) % 4), content, b"\0" * (-len(content) % 4)]
        self._names.add(name)

    def directory(self, name: str) -> None:
        if name not in self._names:
            self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes, mode: int = 0o755) -> None:
        self._add(name, stat.S_IFREG | mode, content)

    def image(self) -> bytes:
        self._add("TRAILER!!!", 0)
        return b"".join(self._parts)


def build(kernel: Kernel, files: dict[str, bytes]) -> bytes:
    """Return the image; `files` are this run's own, put below /lab."""
    archive = Archive()
    for name in ("bin", "lab", MODULE_DIRECTORY, "proc", "sys", "dev", "lower", "rw"):
        archive.directory(name)
    archive.file("bin/busybox", Path(need("busybox")).read_bytes())
    archive.file("init", (GUEST / "init").read_bytes())
    archive.file("lab/stage2", (GUEST / "stage2").read_bytes())
    order = kernel.load_order()
    for name, content in order:
        archive.file(f"{MODULE_DIRECTORY}/{name}", content, 0o644)
    archive.file(f"{MODULE_DIRECTORY}/order", "".join(f"{n}\n" for n, _ in order).encode(), 0o644)
    for name, content in files.items():
        archive.file(f"lab/{name}", content)
    return archive.image()
