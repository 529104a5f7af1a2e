# SPDX-License-Identifier: Apache-2.0
"""Directories that were damaged, edited, or made to harm: one clear line each."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import snapshot_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st

from rdma_mig.errors import SnapshotError
from rdma_mig.memory import GuestMemory
from rdma_mig.snapshot import Snapshot
from rdma_mig.snapshot.manifest import Manifest

MIB = 1 << 20
many = settings(deadline=None, derandomize=True, database=None, max_examples=200)


def refused(call, match):
    with pytest.raises(SnapshotError, match=match) as caught:
        call()
    text = str(caught.value)
    assert text.isprintable(), "more than one line, or control characters"
    assert caught.value.remedy
    return text


def load_everything(path):
    """What `outgoing` does with a snapshot."""
    with Snapshot.open(path) as snapshot:
        _ = snapshot.config, snapshot.device_state, snapshot.description
        for index, block in enumerate(snapshot.blocks):
            with GuestMemory(block.length, block.idstr) as memory:
                snapshot.load_ram(index, memory)


def verify(path):
    with Snapshot.open(path) as snapshot:
        snapshot.verify()


def flip(path, offset, bit=0):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


# -- not there, not ours -----------------------------------------------------------------------


def test_nothing_there(tmp_path):
    text = refused(lambda: Snapshot.open(tmp_path / "vm"), "there is no snapshot")
    assert str(tmp_path / "vm") in text


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ("vm.incomplete", "failed after the source had finished"),
        ("vm.incomplete.2", "failed after the source had finished"),
        ("vm.partial-17", "did not finish"),
    ],
)
def test_only_an_unfinished_one_is_there(tmp_path, beside, told):
    (tmp_path / beside).mkdir()
    (tmp_path / "vm2.incomplete").mkdir()
    text = refused(lambda: Snapshot.open(tmp_path / "vm"), told)
    assert str(tmp_path / beside) in text


def test_a_file_is_no_snapshot(tmp_path):
    (tmp_path / "vm").write_text("x")
    refused(lambda: Snapshot.open(tmp_path / "vm"), "not a directory")


def test_an_empty_directory_is_no_snapshot(tmp_path):
    refused(lambda: Snapshot.open(tmp_path), r"has no manifest\.json")


def test_a_partial_opened_by_its_name(tmp_path, memories):
    (tmp_path / "manifest.json").touch()
    refused(lambda: Snapshot.open(tmp_path), "did not finish")


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"format": NaN}', "not JSON"),
        (b'{"version": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"format": "rdma-mig-snapshot", "version": 1, "version": 1}', "not JSON"),
        (b"[]", "not the manifest"),
        (b"null", "not the manifest"),
        (b'{"format": "qcow2", "version": 1}', "not the manifest"),
        (b'{"format": "rdma-mig-snapshot"}', "not the manifest"),
        (b'{"format": "rdma-mig-snapshot", "version": true}', "not the manifest"),
        (b'{"format": "rdma-mig-snapshot", "version": 0}', "not the manifest"),
        (b'{"format": "rdma-mig-snapshot", "version": 3}', "version 3, this rdma-mig reads 1 to 2"),
        (b'{"format": "rdma-mig-snapshot", "version": 1}', "damaged: the manifest lacks"),
        (b" " * ((16 << 20) + 1), "longer than"),
    ],
    ids=range(15),
)
def test_manifests_that_are_none(kept, raw, match):
    (kept / "manifest.json").write_bytes(raw)
    text = refused(lambda: Snapshot.open(kept), match)
    assert str(kept / "manifest.json") in text


# -- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "offset", "match"),
    [
        ("ram/0.raw", 0, r"ram/0\.raw is damaged: RAM block pc\.ram.* at offset 0x0;"),
        ("ram/0.raw", 2 * MIB + 4095, r"RAM block pc\.ram differs.* at offset 0x200000;"),
        ("ram/0.raw", 5 * MIB + 4095, r"the 4 KiB at offset 0x500000;"),
        ("ram/0.raw", 4 * MIB + 77, r"at offset 0x400000;"),
        ("ram/1.raw", 99_999, r"RAM block /rom@etc/acpi/tables differs"),
        ("ram/2.raw", 3 * MIB - 1, r"RAM block pc\.rom differs.* at offset 0x200000;"),
        ("ram/0.xxh3", 3, r"ram/0\.xxh3 is damaged: its sha256"),
        ("config.bin", 2, r"config\.bin is damaged: its sha256"),
        ("vmstate.bin", 5, r"vmstate\.bin is damaged: its sha256"),
        ("vmdesc.json", 9, r"vmdesc\.json is damaged: its sha256"),
    ],
)
def test_a_single_bit(kept, name, offset, match):
    for bit in (0, 7):
        flip(kept / name, offset, bit)
        refused(lambda: verify(kept), match)
        refused(lambda: load_everything(kept), match)
        flip(kept / name, offset, bit)
        if name.endswith("2.raw"):
            break
    verify(kept)
    load_everything(kept)


def test_unverified_loading_does_not_look_at_digests(kept):
    flip(kept / "ram/0.raw", 5)
    with Snapshot.open(kept) as snapshot, GuestMemory(kit.BLOCKS[0].length, "x") as memory:
        snapshot.load_ram(0, memory, verify=False)


def test_data_that_became_a_hole(kept):
    with (kept / "ram/0.raw").open("r+b") as file:
        file.truncate(MIB)
        file.truncate(kit.BLOCKS[0].length)
    refused(lambda: verify(kept), r"pc\.ram differs .* 0x200000")
    refused(lambda: load_everything(kept), r"pc\.ram differs .* 0x200000")


@pytest.mark.parametrize(
    "name", ["ram/0.raw", "ram/1.raw", "ram/2.xxh3", "config.bin", "vmstate.bin", "vmdesc.json"]
)
def test_sizes(kept, name):
    path = kept / name
    size = path.stat().st_size
    os.truncate(path, size - 3)
    refused(lambda: Snapshot.open(kept), f"{name} lacks 3 of its {size} bytes")
    os.truncate(path, size + 5)
    refused(lambda: Snapshot.open(kept), f"{name} has 5 bytes more than its {size}")
    path.unlink()
    refused(lambda: Snapshot.open(kept), f"cannot open .*{name}: No such file")


def test_a_file_cut_short_while_it_is_read(kept):
    with Snapshot.open(kept) as snapshot, GuestMemory(kit.BLOCKS[0].length, "x") as memory:
        os.truncate(kept / "ram/0.raw", MIB)
        refused(lambda: snapshot.load_ram(0, memory), r"ram/0\.raw: Input/output error")


def test_a_manifest_that_lost_an_entry(kept):
    path = kept / "manifest.json"
    good = json.loads(path.read_bytes())
    content = copy.deepcopy(good)
    del content["blocks"][2]
    path.write_text(json.dumps(content))
    refused(lambda: Snapshot.open(kept), r"does not list ram/2\.raw")
    content = copy.deepcopy(good)
    del content["files"]["vmdesc.json"]
    path.write_text(json.dumps(content))
    refused(lambda: Snapshot.open(kept), r"does not list vmdesc\.json")


def test_a_wrong_count_of_data(kept):
    path = kept / "manifest.json"
    content = json.loads(path.read_bytes())
    content["blocks"][0]["data_bytes"] -= 4096
    path.write_text(json.dumps(content))
    refused(lambda: verify(kept), "bytes of data")


def test_an_eof_offset_where_no_eof_is(kept):
    path = kept / "manifest.json"
    content = json.loads(path.read_bytes())
    content["files"]["vmstate.bin"]["eof_offset"] -= 1
    path.write_text(json.dumps(content))
    refused(lambda: verify(kept), "EOF")


# -- ways out of the directory --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["manifest.json", "ram", "ram/0.raw", "ram/0.xxh3", "config.bin", "vmstate.bin"]
)
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "dangling", "device"])
def test_what_is_not_a_plain_file_is_refused(kept, name, kind):
    path, moved = kept / name, kept.parent / "moved"
    path.rename(moved)
    match kind:
        case "link":
            path.symlink_to(moved)
        case "dangling":
            path.symlink_to(kept.parent / "nowhere")
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
    if name == "manifest.json" and kind == "directory":
        refused(lambda: Snapshot.open(kept), "cannot")
    else:
        refused(lambda: Snapshot.open(kept), "cannot open|cannot read")


@pytest.mark.parametrize("bad", ["../../etc/passwd", "/etc/passwd", "ram/1.raw", "0.raw", "", None])
def test_file_names_are_not_taken_from_the_manifest(kept, bad):
    path = kept / "manifest.json"
    content = json.loads(path.read_bytes())
    for where in (content["blocks"][0], content["blocks"][0]["digests"]):
        before = where["file"]
        where["file"] = bad
        path.write_text(json.dumps(content))
        refused(lambda: Snapshot.open(kept), "file of block 0 is not")
        where["file"] = before


def test_names_are_told_in_one_printable_line(kept):
    path = kept / "manifest.json"
    content = json.loads(path.read_bytes())
    content["blocks"][0]["name"] = "pc\n\x1b[2J\udc80.ram"
    path.write_text(json.dumps(content))
    flip(kept / "ram/0.raw", 0)
    text = refused(lambda: verify(kept), r"RAM block pc\\n\\x1b\[2J")
    assert "\\udc80" in text


@pytest.mark.parametrize("name", ["new\nline", "\udc80", "\x1b[31m"])
def test_paths_are_told_in_one_printable_line(tmp_path, name):
    refused(lambda: Snapshot.open(tmp_path / name), "there is no snapshot")


# -- fuzz -----------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.sampled_from([0, 1, 2, 4096, 1 << 20, 1 << 52, (1 << 52) + 1, 1 << 63])
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None), max_size=20)
    | st.sampled_from(["pc.ram", "pc.rom", "ram/1.raw", "a" * 64, "0" * 64]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with kit.guest() as memories:
        kept = kit.keep(tmp_path_factory.mktemp("fuzz") / "vm", memories)
    return kept, json.loads((kept / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def try_manifest(base):
    kept, _ = base

    def attempt(raw):
        (kept / "manifest.json").write_bytes(raw)
        try:
            verify(kept)
        except SnapshotError as error:
            told = error
        else:
            return True
        assert str(told).isprintable()
        assert told.remedy
        return False

    return attempt


@many
@given(st.data())
def test_edited_manifests(base, try_manifest, data):
    content = copy.deepcopy(base[1])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(content))[1:]))
        target = content
        for key in path[:-1]:
            target = target[key]
        match data.draw(st.sampled_from(["set", "delete", "add", "copy"])):
            case "set":
                target[path[-1]] = data.draw(json_values)
            case "delete":
                del target[path[-1]]
            case "add" if isinstance(target, dict):
                target[data.draw(st.text(max_size=8))] = data.draw(json_values)
            case _ if isinstance(target, list):
                target.append(target[path[-1]])
        if not content:
            break
    if try_manifest(json.dumps(content).encode()):
        # What was accepted says nothing else than before about the bytes.
        meaning = Manifest.decode(json.dumps(content).encode(), "x")
        assert Manifest.decode(meaning.encode(), "x") == meaning
        for name in ("blocks", "files"):
            for key in ("length", "sha256", "size"):
                assert _all(content[name], key) == _all(base[1][name], key)


def _all(value, key):
    found = []
    for path in places(value):
        if path and path[-1] == key:
            target = value
            for step in path:
                target = target[step]
            found.append(target)
    return found


@many
@given(st.data())
def test_manifests_with_wrong_bytes(base, try_manifest, data):
    raw = bytearray(json.dumps(base[1]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "drop", "repeat"])):
            case "flip":
                raw[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del raw[at + 1 :]
            case "drop":
                del raw[at]
            case _:
                raw[at:at] = raw[at : at + 9]
        if not raw:
            break
    try_manifest(bytes(raw))


@many
@given(st.binary(max_size=200))
def test_garbage(try_manifest, raw):
    assert not try_manifest(raw)


def test_a_guest_that_is_all_manifest(base, try_manifest):
    """Lengths that files do not back are refused before anything is read or allocated."""
    kept, good = base
    content = copy.deepcopy(good)
    content["blocks"][0]["length"] = 1 << 52
    assert not try_manifest(json.dumps(content).encode())
    shutil.copytree(kept, kept.parent / "copy")
    large = kept.parent / "copy"
    length = 1 << 40
    with Path(large, "ram/0.raw").open("r+b") as file:
        file.truncate(length)
    with Path(large, "ram/0.xxh3").open("r+b") as file:
        file.truncate(length // MIB * 16)
    content["blocks"][0]["length"] = length
    (large / "manifest.json").write_text(json.dumps(content))
    refused(lambda: verify(large), r"0\.xxh3 is damaged")
