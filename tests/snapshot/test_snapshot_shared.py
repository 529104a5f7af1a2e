# SPDX-License-Identifier: Apache-2.0
"""RAM blocks that stay with whoever shares them: which they are, and how the directory says so."""

import copy
import json
from dataclasses import replace

import pytest
import snapshot_kit as kit

from rdma_mig.errors import SnapshotError, UsageError
from rdma_mig.memory import RamBlock
from rdma_mig.migration.shared_blocks import choose_shared
from rdma_mig.snapshot import SharedBlock, Snapshot, SnapshotWriter
from rdma_mig.wire.stream import Capabilities, StreamBlock, StreamHead, TargetPageBits

MIB = 1 << 20
SHARED = (
    SharedBlock(0, RamBlock("mem0", 1 << 40, guest_address=0)),
    SharedBlock(3, RamBlock("mem1", 64 * MIB, guest_address=1 << 32)),
)


@pytest.fixture
def shared(tmp_path):
    with kit.guest() as memories, SnapshotWriter(tmp_path / "vm") as writer:
        kit.fill(writer, memories)
        return kit.commit(writer, replace(kit.FACTS, shared=SHARED))


def test_what_is_shared_is_listed_and_not_kept(shared, tmp_path):
    with Snapshot.open(shared) as snapshot:
        snapshot.verify()
        assert snapshot.blocks == kit.BLOCKS
        assert snapshot.manifest.shared == SHARED
        listed = [(block.idstr, kept) for block, kept in snapshot.manifest.listed]
    names = [block.idstr for block in kit.BLOCKS]
    assert listed == [
        ("mem0", True), (names[0], False), (names[1], False), ("mem1", True), (names[2], False),
    ]  # fmt: skip
    assert json.loads((shared / "manifest.json").read_text())["version"] == 2
    with kit.guest() as memories:
        plain = kit.keep(tmp_path / "plain", memories)
    assert json.loads((plain / "manifest.json").read_text())["version"] == 1
    for path in plain.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (shared / path.relative_to(plain)).read_bytes()


DAMAGE = {
    "version 1 knows no such key": lambda m: m.update(version=1),
    "version 2 without it": lambda m: m.pop("shared_blocks"),
    "none": lambda m: m.update(shared_blocks=[]),
    "no list": lambda m: m.update(shared_blocks={}),
    "a position that is out of range": lambda m: m["shared_blocks"][1].update(position=5),
    "a negative position": lambda m: m["shared_blocks"][0].update(position=-1),
    "positions that are equal": lambda m: m["shared_blocks"][1].update(position=0),
    "positions that decrease": lambda m: m["shared_blocks"].reverse(),
    "a name of a block that is kept": lambda m: m["shared_blocks"][0].update(name="pc.ram"),
    "a name that is given twice": lambda m: m["shared_blocks"][0].update(name="mem1"),
    "no bytes": lambda m: m["shared_blocks"][0].update(length=0),
    "a file": lambda m: m["shared_blocks"][0].update(file="ram/0.raw"),
    "no address": lambda m: m["shared_blocks"][0].pop("guest_address"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(shared, damage):
    path = shared / "manifest.json"
    content = copy.deepcopy(json.loads(path.read_text()))
    DAMAGE[damage](content)
    path.write_text(json.dumps(content))
    with pytest.raises(SnapshotError, match="is damaged: ") as caught:
        Snapshot.open(shared)
    assert str(caught.value).isprintable()


# ---- which blocks are shared ----

SHARES = StreamHead(b"", "pc-q35-7.2", (TargetPageBits(12), Capabilities(("x-ignore-shared",))))
PLAIN = StreamHead(b"", "pc-q35-7.2", (Capabilities(("x-other",)),))


def choose(*names, named=None, head=SHARES, longest="pc.ram"):
    blocks = [StreamBlock(name, 8192 if name == longest else 4096) for name in names]
    return choose_shared(head, blocks, named)


@pytest.mark.parametrize(
    ("listed", "guess"),
    [
        (["pc.bios", "pc.ram", "pc.rom"], {"pc.ram"}),
        (["mem0", "pc.bios"], {"mem0"}),
        (["/objects/m0", "/rom@etc/acpi/tables", "/objects/m1"], {"/objects/m0", "/objects/m1"}),
        (["pc.ram", "ram-node0", "ram-node1", "pc.bios"], {"ram-node0", "ram-node1"}),
        (["pc.ram", "ram-node", "ram-nodes"], {"pc.ram"}),
    ],
)  # fmt: skip
def test_guess(listed, guess):
    chosen = choose(*listed)
    assert (chosen.names, chosen.guessed, chosen.asked) == (guess, True, True)
    assert all(name in chosen.warning for name in guess)
    assert "taken as shared" in chosen.warning
    assert "a guess" in chosen.remedy
    assert "--shared-block NAME" in chosen.remedy


def test_named():
    chosen = choose("pc.ram", "mem0", "pc.rom", named=["mem0", "pc.rom"])
    assert (chosen.names, chosen.guessed, chosen.asked) == ({"mem0", "pc.rom"}, False, True)
    assert "mem0, pc.rom are shared" in chosen.warning
    chosen = choose("pc.ram", "pc.rom", named=["none"])
    assert (chosen.names, chosen.guessed, chosen.asked, chosen.warning) == (set(), False, True, "")


def test_without_the_capability_nothing_is_shared():
    for named in (None, [], ["none"]):
        chosen = choose("/objects/mem0", "pc.rom", named=named, head=PLAIN)
        assert (chosen.names, chosen.asked, chosen.warning) == (set(), False, "")
    chosen = choose("pc.ram", "pc.rom", named=["pc.ram"], head=PLAIN)
    assert (chosen.names, chosen.asked) == (set(), False)
    assert "without effect" in chosen.warning


def test_what_cannot_be():
    with pytest.raises(UsageError, match="lists no such RAM block") as caught:
        choose("pc.ram", "pc.rom", named=["pc.ram", "pc.ran"])
    assert "pc.ram, pc.rom" in caught.value.remedy
    with pytest.raises(UsageError, match="none received"):
        choose("pc.ram", "pc.rom", named=["pc.rom", "pc.ram"])
    with pytest.raises(UsageError, match="none received"):
        choose("/objects/a", "/objects/b")
