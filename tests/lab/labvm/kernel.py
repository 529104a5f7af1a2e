# SPDX-License-Identifier: Apache-2.0
"""The stock Debian kernel: fetched as a package, unpacked beside the project, never installed."""

import lzma
import os
import re
import shutil
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from labvm import siw
from labvm.host import CACHE, LabError, find, locked, need, run

# In this order; each brings its dependencies. rdma_rxe wants crc32 of the crypto API, and fails
# with ENOENT where crc32_generic is not there.
MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "9pnet_virtio",
    "9p",
    "overlay",
    "crc32_generic",
    "veth",
    "dummy",
    "rdma_rxe",
    "rdma_ucm",
    "ib_uverbs",
)


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    version: str
    tree: Path

    @property
    def image(self) -> Path:
        """What QEMU boots: the kernel unpacked where we could do that, else as it was packed."""
        unpacked = self.tree / "boot" / f"vmlinux-{self.version}"
        packed = self.tree / "boot" / f"vmlinuz-{self.version}"
        return unpacked if unpacked.exists() else packed

    @property
    def modules(self) -> Path:
        """The directory to be mounted at /lib/modules."""
        return self.tree / "lib" / "modules"

    def load_order(self) -> list[tuple[str, bytes]]:
        """Return (file name, content) of each module that the lab loads, dependencies first."""
        order: dict[str, bytes] = {}
        modprobe = [need("modprobe"), "-d", str(self.tree), "-S", self.version, "--show-depends"]
        for module in MODULES:
            shown = run("modules", [*modprobe, module])
            for line in shown.splitlines():
                word = line.split()
                if word[:1] == ["insmod"]:
                    path = Path(word[1])
                    order.setdefault(path.name.removesuffix(".xz"), _module(path))
        return list(order.items())


def _module(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix != ".ko":
        raise LabError("modules", f"{path.name}: this compression is not known")
    return content


def unpacked_image(packed: bytes) -> bytes | None:
    """Return the ELF kernel inside a bzImage, or None where its compression is not known here.

    QEMU boots it by its PVH entry; unpacking 60 MB of xz in an emulated machine takes longer than
    all the rest of the boot. Layout: the kernel's Documentation/arch/x86/boot.rst.
    """
    if packed[0x202:0x206] != b"HdrS":
        return None
    sectors = packed[0x1F1] or 4
    offset, length = struct.unpack_from("<II", packed, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = packed[start : start + length]
    # The payload is followed by its length in four bytes, which the plain functions refuse.
    if payload.startswith(b"\xfd7zXZ\0"):
        image = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        image = zlib.decompressobj(wbits=31).decompress(payload)
    else:
        return None
    return image if image.startswith(b"\x7fELF") else None


def _package() -> str:
    """Name the package that linux-image-amd64 depends on now."""
    if find("apt-cache") is None or find("dpkg") is None:
        raise LabError("kernel", "fetching Debian's kernel needs apt and dpkg")
    said = run("kernel", [need("apt-cache"), "depends", "linux-image-amd64"])
    names: list[str] = re.findall(r"^\s*Depends:\s*(linux-image-\d\S*)$", said, re.MULTILINE)
    if not names:
        raise LabError("kernel", "apt knows no linux-image-amd64: run apt-get update first")
    return names[0]


def _fetch(tree: Path) -> None:
    package = _package()
    with tempfile.TemporaryDirectory(prefix="kernel-", dir=CACHE) as temporary:
        work = Path(temporary)
        # apt's own sandbox user cannot write here, and saying so on each download helps nobody.
        options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        run("kernel", [need("apt-get"), "download", *options, package], cwd=work)
        packages = list(work.glob("*.deb"))
        if len(packages) != 1:
            raise LabError("kernel", f"apt-get download {package} left {len(packages)} packages")
        unpacked = work / "unpacked"
        run("kernel", [need("dpkg"), "-x", str(packages[0]), str(unpacked)])
        version = package.removeprefix("linux-image-")
        # A package of a merged-/usr release has its modules below usr/.
        if not (unpacked / "lib" / "modules" / version).is_dir():
            (unpacked / "lib").mkdir(exist_ok=True)
            (unpacked / "usr" / "lib" / "modules").rename(unpacked / "lib" / "modules")
        image = unpacked_image((unpacked / "boot" / f"vmlinuz-{version}").read_bytes())
        if image is not None:
            (unpacked / "boot" / f"vmlinux-{version}").write_bytes(image)
        run("kernel", [need("depmod"), "-b", str(unpacked), version])
        shutil.rmtree(unpacked / "usr", ignore_errors=True)
        (unpacked / "VERSION").write_text(version + "\n")
        unpacked.rename(tree)


def get() -> Kernel:
    """Return the cached kernel; fetch it the first time."""
    tree = CACHE / "kernel"
    with locked("kernel"):
        if not (tree / "VERSION").exists():
            _fetch(tree)
        kernel = Kernel((tree / "VERSION").read_text().strip(), tree)
        siw.add(tree, kernel.version)
    if not os.access(kernel.image, os.R_OK):
        raise LabError("kernel", f"{kernel.image} is not there or not readable: remove {tree}")
    return kernel
