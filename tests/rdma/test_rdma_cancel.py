# SPDX-License-Identifier: Apache-2.0
"""cancel() from another thread ends a destination within two seconds, whatever it is doing.

That of a source is in test_rdma_bad_destination.py, signals are in tests/interop.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import rdma_command as command
import rdma_kit as kit
import snapshot_kit

from rdma_mig.errors import MigrationCancelled, MigrationError, PeerGone
from rdma_mig.memory import RamBlock
from rdma_mig.migration.events import MigrationEvent, Progress, Warned
from rdma_mig.migration.send import SnapshotSource
from rdma_mig.migration.state import Migration
from rdma_mig.snapshot import Snapshot
from rdma_mig.wire.control import ControlType
from rdma_mig.wire.stream import StreamBlock, encode_hook, encode_ram_start

pytestmark = pytest.mark.rdma

PROMPT = 2.0


def cancelled(end: kit.End, began: float) -> MigrationCancelled:
    """The destination ends as one that was cancelled at this moment."""
    error = end.fail(MigrationCancelled)
    took = time.monotonic() - began
    assert took < kit.patience(PROMPT), f"it took {took:.2f} s"
    assert error.exit_status == 5
    return error


def cancel(end: kit.End) -> float:
    began = time.monotonic()
    thread = threading.Thread(target=end.migration.cancel)
    thread.start()
    thread.join()
    return began


def last_word(peer: kit.Peer) -> ControlType:
    """What the destination said last before it disconnected."""
    said = ControlType.READY
    try:
        while True:
            said = peer.receive().type
    except PeerGone:
        return said


@pytest.mark.parametrize("step", ["listening", *kit.SOURCE_STEPS[:-1]])
def test_in_every_wait_for_a_source(room: Path, step: str):
    with kit.RawListener():
        pass  # librdmacm keeps a context of the device once it has been used
    before = kit.resources()
    with kit.incoming(room / "vm") as end:
        if step == "listening":
            began = cancel(end)
            with pytest.raises(MigrationCancelled):  # there is no machine yet that has an owner
                end.migration.wait(kit.patience(10))
            assert time.monotonic() - began < kit.patience(PROMPT)
        else:
            with kit.dial(end.uri) as peer:
                kit.until(step, kit.act_as_source(peer))
                time.sleep(0.1)  # until it waits
                error = cancelled(end, cancel(end))
                handed = kit.SOURCE_STEPS.index(step) >= kit.COMMITTED
                assert ("`cont` there" if handed else "still the source's") in error.owner
                assert last_word(peer) is ControlType.ERROR
    kit.settle(before)


@pytest.mark.deadline(60)
def test_while_much_memory_is_populated(room: Path):
    block = RamBlock("pc.ram", 2 << 30)
    head = snapshot_kit.HEAD + encode_ram_start(2, [StreamBlock(block.idstr, block.length)])
    with kit.incoming(room / "vm") as end, kit.dial(end.uri) as peer:
        peer.stream(head + encode_hook())
        peer.command(ControlType.RAM_BLOCKS_REQUEST)
        time.sleep(0.05)
        error = cancelled(end, cancel(end))
        assert "populat" in error.message or "cancelled" in error.message
        with pytest.raises((PeerGone, AssertionError)):
            peer.expect(ControlType.RAM_BLOCKS_RESULT)
    assert not list(room.iterdir())


def on_progress(phase: str, migration: Migration, at: list[float]):
    def look(event: MigrationEvent) -> None:
        if isinstance(event, Progress) and event.phase == phase:
            at.append(time.monotonic())
            migration.cancel()

    return look


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A snapshot with so much data that progress is told while it is read and written."""
    blocks = (RamBlock("pc.ram", 72 * kit.MIB),)
    with snapshot_kit.guest(blocks) as memories:
        with memories[0].view() as view:
            view[:] = snapshot_kit.noise(len(view))
        return snapshot_kit.keep(tmp_path / "large", memories, blocks)


def test_while_the_snapshot_is_written(large: Path, room: Path):
    at: list[float] = []
    with kit.incoming(room / "vm") as end:
        end.migration._on_event = on_progress("write", end.migration, at)
        source = kit.Worker(lambda: command.run("outgoing", large, end.uri))
        error = end.fail(MigrationCancelled)
        assert time.monotonic() - at[0] < kit.patience(PROMPT)
        assert "vm.incomplete" in error.remedy
        assert "is unchanged" in command.failed(source.result(), 1)
    assert [path.name for path in room.iterdir()] == ["vm.incomplete"]


def test_while_a_snapshot_is_loaded(large: Path):
    at: list[float] = []
    with Snapshot.open(large) as snapshot, Migration() as migration:
        migration._on_event = on_progress("load", migration, at)
        source = SnapshotSource(snapshot)
        try:
            with pytest.raises(MigrationCancelled):
                source.load(migration)
        finally:
            source.close()
    assert time.monotonic() - at[0] < kit.patience(PROMPT)


def test_refused_client_has_no_queue_pair_here(room: Path):
    """When it is turned away there is its own queue pair on the device, and no other."""
    counted: list[int] = []
    before = kit.resources()["qp"]
    with kit.incoming(room / "vm", allow=("198.51.100.1",)) as end:

        def look(event: MigrationEvent) -> None:
            if isinstance(event, Warned):
                counted.append(kit.resources()["qp"] - before)

        end.migration._on_event = look
        with pytest.raises(MigrationError, match="--allow"), kit.dial(end.uri):
            pytest.fail("it was accepted")
    assert counted == [1]


@pytest.mark.parametrize("pin_all", [True, False], ids=["pin-all", "dynamic"])
def test_trace_of_a_whole_migration(kept: Path, room: Path, pin_all: bool):
    mode = ["--rdma-pin-all"] if pin_all else []
    uri = f"rdma:{kit.device()[1]}:0"
    with command.incoming(uri, room / "vm", "--trace", str(room / "in")) as end:
        sent = command.run("outgoing", kept, end.uri, "--trace", room / "out", *mode)
        assert sent.returncode == 0, sent.stderr
        end.events()
    told = {
        name: [json.loads(line) for line in (room / name).read_text().splitlines()]
        for name in ("in", "out")
    }
    for name, mirror in (("in", "out"), ("out", "in")):
        sent = [each["type"] for each in told[name] if each["kind"] == "out"]
        got = [each["type"] for each in told[mirror] if each["kind"] == "in"]
        assert sent == got
        registered = [
            {key: value for key, value in each.items() if key != "seconds"} | {"kind": "", "t": 0}
            for each in told[name]
            if each["kind"] == "register"
        ]
        withdrawn = [
            {**each, "kind": "", "t": 0} for each in told[name] if each["kind"] == "deregister"
        ]
        assert sorted(map(str, registered)) == sorted(map(str, withdrawn))
        # A source at rest registers what holds data, with pin-all too.
        whole = pin_all and name == "in"
        assert all((each["chunk"] is None) == whole for each in registered)
        assert told[name][-1]["status"] == "completed"
    checked = command.run("trace", "check", room / "in", room / "out")
    assert checked.returncode == 0, checked.stderr
    commits = [(each["by"], each["state"]) for each in told["in"] if each["kind"] == "commit"]
    assert commits == [("FINAL_ACK", "before"), ("FINAL_ACK", "passed")]
    commits = [(each["by"], each["state"]) for each in told["out"] if each["kind"] == "commit"]
    assert commits == [("EOF", "before"), ("EOF", "passed")]
