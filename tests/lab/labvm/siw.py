# SPDX-License-Identifier: Apache-2.0
"""Software iWARP for the lab's kernel: Debian ships its source and does not build it."""

import os
import re
import sys
import tarfile
import tempfile
from pathlib import Path

from labvm.host import CACHE, LabError, need, run

_SOURCE = "/drivers/infiniband/sw/siw/"


def add(tree: Path, version: str) -> None:
    """Build the module for the unpacked kernel and put it among its modules, unless it is there.

    Without it the lab works all the same, so a failure is told and no more: what wants the module
    fails by itself.
    """
    target = tree / "lib" / "modules" / version / "extra" / "siw.ko"
    if target.exists():
        return
    try:
        _add(tree, version, target)
    except (LabError, OSError, tarfile.TarError) as error:
        print(f"lab: no software iWARP (siw): {error}", file=sys.stderr)


def _add(tree: Path, version: str, target: Path) -> None:
    series = ".".join(version.split(".")[:2])
    headers = f"linux-headers-{version}"
    depends = run("siw", [need("apt-cache"), "depends", headers])
    packages: list[str] = re.findall(
        r"^\s*Depends:\s*(linux-(?:headers|kbuild)-\S+)$", depends, re.MULTILINE
    )
    with tempfile.TemporaryDirectory(prefix="siw-", dir=CACHE) as temporary:
        work = Path(temporary)
        options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        names = [headers, *packages, f"linux-source-{series}"]
        run("siw", [need("apt-get"), "download", *options, *names], cwd=work)
        root = work / "root"
        for package in sorted(work.glob("*.deb")):
            run("siw", [need("dpkg"), "-x", str(package), str(root)])
        source = _unpack(root / "usr" / "src" / f"linux-source-{series}.tar.xz", work / "siw")
        build = root / "usr" / "src" / headers
        # It names the other package by its place on a system where both are installed.
        makefile = build / "Makefile"
        makefile.write_text(makefile.read_text().replace(" /usr/src/", f" {root}/usr/src/"))
        # A make that started this one has left options to its own kind.
        clean = ["env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", need("make")]
        given = [f"M={source}", "CONFIG_RDMA_SIW=m", "CC=gcc", "modules"]
        run("siw", [*clean, "-C", str(build), *given])
        run("siw", [need("strip"), "--strip-debug", str(source / "siw.ko")])
        target.parent.mkdir(exist_ok=True)
        (source / "siw.ko").rename(target)
    run("siw", [need("depmod"), "-b", str(tree), version])


def _unpack(archive: Path, target: Path) -> Path:
    """Take the driver's files out of the kernel's source; return their directory."""
    target.mkdir()
    with tarfile.open(archive, "r|xz") as members:
        for member in members:
            _, found, name = member.name.partition(_SOURCE)
            content = members.extractfile(member) if found and member.isfile() else None
            if content is not None:
                (target / Path(name).name).write_bytes(content.read())
            elif any(target.iterdir()) and not found:
                break  # the rest is another hundred million bytes of something else
    return target
