# SPDX-License-Identifier: Apache-2.0
"""What is in the sdist and in the wheels, and that nothing else is."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import packaging_kit as kit
import pytest

pytestmark = pytest.mark.packaging

VERSION = kit.source_version()
DIST_INFO = f"rdma_mig-{VERSION}.dist-info"
CHECKOUT_ONLY = (".github/", ".gitattributes")
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture(scope="module")
def sdist_files(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        top = f"rdma_mig-{VERSION}"
        assert all(m.isfile() or m.isdir() for m in members), "links or devices"
        assert {m.name.split("/")[0] for m in members} == {top}
        return {
            m.name.removeprefix(f"{top}/"): archive.extractfile(m).read()
            for m in members
            if m.isfile()
        }


@pytest.fixture(scope="module", params=["wheel", "bare_wheel"])
def built(request):
    """Name of the fixture, and the wheel's path."""
    return request.param, request.getfixturevalue(request.param)


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert len(names) == len(set(names))
        return {name: archive.read(name) for name in names}


def test_sdist_is_the_tracked_tree(sdist_files, tree):
    tracked = kit.check(["git", "ls-files", "-z"], cwd=tree).split("\0")[:-1]
    wanted = {name for name in tracked if not name.startswith(CHECKOUT_ONLY)} | {"PKG-INFO"}
    assert set(sdist_files) == wanted
    # Not what git happens to hold, but what a packager needs.
    assert {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "cext/_dirty.pyx",
        "cext/_hooks.pyx",
        "cext/_mapped.pyx",
        "cext/_pages.pyx",
        "cext/_stream.pyx",
        "cext/_verbs.pyx",
        "cext/pages.pxd",
        "cext/verbs.pxd",
        "cext/xbzrle.pxi",
        "demo/run",
        "docs/protocol.md",
        "man/rdma-migrate.1",
        "meson.build",
        "meson.options",
        "pyproject.toml",
        "rdma_mig/py.typed",
        "tests/packaging/test_archives.py",
    } <= set(sdist_files)


def test_sdist_has_no_product_of_a_build(sdist_files):
    products = (".so", ".o", ".pyc", ".whl", ".gz", ".log", ".c")
    parts = {part for name in sdist_files for part in name.split("/")}
    written = {"tests/memory/writer.c", "tests/bench/paced.c"}
    assert not [name for name in set(sdist_files) - written if name.endswith(products)]
    assert not parts & {"__pycache__", "build", "dist", ".venv", ".git", ".lab", "test-logs"}
    assert not [part for part in parts if part.endswith("_cache")]


def test_every_source_file_names_its_licence(sdist_files):
    without = [
        name
        for name, content in sdist_files.items()
        if name.endswith((".py", ".pyx", ".pxd", ".pxi", ".S", ".inc", ".c"))
        and b"SPDX-License-Identifier: Apache-2.0" not in b"".join(content.splitlines(True)[:2])
    ]
    assert without == []


def test_wheel_holds_the_package_and_nothing_else(built, tree):
    name, wheel = built
    sources = kit.check(["git", "ls-files", "-z", "rdma_mig"], cwd=tree).split("\0")[:-1]
    assert all(source.endswith((".py", ".pyi", ".pxd", ".json", "py.typed")) for source in sources)
    layers = [
        "_dirty",
        "_hooks",
        "_mapped",
        "_pages",
        "_stream",
        *(["_verbs"] if name == "wheel" else []),
    ]
    assert set(members(wheel)) == {
        *sources,
        *(f"rdma_mig/{layer}{EXT_SUFFIX}" for layer in layers),
        f"rdma_mig-{VERSION}.data/data/share/man/man1/rdma-migrate.1",
        *(
            f"{DIST_INFO}/{file}"
            for file in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
        ),
    }
    assert {"rdma_mig/py.typed", *(f"rdma_mig/{layer}.pyi" for layer in layers)} <= set(sources)


def test_wheel_has_the_tree_s_modules_unchanged(built, tree):
    for name, content in members(built[1]).items():
        if name.endswith((".py", ".pyi")):
            assert content == (tree / name).read_bytes(), name


def test_wheel_record(built):
    files = members(built[1])
    rows = list(csv.reader(io.StringIO(files[f"{DIST_INFO}/RECORD"].decode())))
    assert sorted(row[0] for row in rows) == sorted(files)
    for name, digest, size in rows:
        if name != f"{DIST_INFO}/RECORD":
            found = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode()
            assert digest == f"sha256={found.rstrip('=')}"
            assert int(size) == len(files[name])


def test_wheel_tag(built):
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = f"{python}-{python}-linux_{sysconfig.get_platform().rpartition('-')[2]}"
    wheel = message_from_bytes(members(built[1])[f"{DIST_INFO}/WHEEL"])
    assert wheel["Root-Is-Purelib"] == "false"
    assert wheel.get_all("Tag") == [tag]
    assert built[1].name == f"rdma_mig-{VERSION}-{tag}.whl"


def check_metadata(raw: bytes) -> None:
    metadata = message_from_bytes(raw)
    assert metadata["Name"] == "rdma-mig"
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.11"
    requires = metadata.get_all("Requires-Dist")
    # pyverbs is the distribution's: required, pip would build another that does not fit.
    assert [line for line in requires if "extra ==" not in line] == ["xxhash>=3.0"]
    assert set(metadata.get_all("Provides-Extra")) == {
        "pypi",
        "completion",
        "qmp",
        "chart",
        "metrics",
        "progress",
        "test",
        "fuzz",
        "dev",
    }
    assert [line for line in requires if line.startswith("pyverbs")] == [
        'pyverbs<60,>=59; extra == "pypi"'
    ]
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = (kit.PROJECT / "README.md").read_text()
    assert metadata.get_payload(decode=True).decode().strip() == readme.strip()


def test_metadata(built, sdist_files):
    files = members(built[1])
    check_metadata(files[f"{DIST_INFO}/METADATA"])
    check_metadata(sdist_files["PKG-INFO"])
    assert files[f"{DIST_INFO}/licenses/LICENSE"] == (kit.PROJECT / "LICENSE").read_bytes()
    entry_points = ConfigParser()
    entry_points.read_string(files[f"{DIST_INFO}/entry_points.txt"].decode())
    assert {name: dict(entry_points[name]) for name in entry_points.sections()} == {
        "console_scripts": {"rdma-migrate": "rdma_mig.cli.entry:run"},
        "rdma_mig.guests": {
            "process": "rdma_mig.migration.guests:ProcessGuest",
            "snapshot": "rdma_mig.migration.guests:SnapshotGuest",
        },
        "rdma_mig.transports": {
            name.lower(): f"rdma_mig.migration.transports:{name}Transport"
            for name in ("Rdma", "Tcp", "Unix", "Fd", "Exec", "File")
        },
    }


def dynamic(wheel: Path, layer: str, tmp_path: Path) -> str:
    shared = tmp_path / f"{layer}.so"
    shared.write_bytes(members(wheel)[f"rdma_mig/{layer}{EXT_SUFFIX}"])
    return kit.check(["readelf", "--wide", "--dynamic", "--version-info", shared])


def needed(text: str) -> set[str]:
    return {line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line}


def test_the_rdma_layer_links_the_system_s_libraries(wheel, tmp_path):
    text = dynamic(wheel, "_verbs", tmp_path)
    assert {"libibverbs.so.1", "librdmacm.so.1"} <= needed(text)
    # A private symbol version ties a build to one release of rdma-core.
    assert "IBVERBS_PRIVATE" not in text
    assert "(RPATH)" not in text
    assert "(RUNPATH)" not in text


@pytest.mark.parametrize("layer", ["_dirty", "_hooks", "_mapped", "_pages", "_stream"])
def test_all_but_verbs_need_the_c_library_only(built, tmp_path, layer):
    libraries = needed(dynamic(built[1], layer, tmp_path))
    assert all(name.startswith(("libc.so", "libm.so", "ld-linux")) for name in libraries)


def test_git_ignores_the_litter(tree):
    """What building and testing leave behind shows up in nobody's git status."""
    listed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=tree, capture_output=True, text=True, check=True
    )
    assert listed.stdout == "", "litter that .gitignore does not name"
