# SPDX-License-Identifier: Apache-2.0
"""The guest and the harness that every interop test rests on, without a verbs device.

What these tests would let through, the migration tests could not see: so each check of the harness
is also shown something broken.
"""

from __future__ import annotations

import gc
import os
import struct
import warnings
from pathlib import Path

import pytest
from harness import (
    PAGE_SIZE,
    CounterError,
    Counters,
    Guest,
    HarnessError,
    Qemu,
    check_counters,
    device_address,
    differences,
    fill_random,
    free_port,
    guest_counters,
    heartbeats_in,
    read_blocks,
)
from harness.files import FileBytes, JoinedBytes
from matrix import MACHINES as MATRIX
from support import MIB

MACHINES = ["pc", "q35"]
GUESTS = [Guest.idle(), Guest.dirtying(4)]


def guest_name(guest: Guest) -> str:
    return "dirtying" if guest.pages else "idle"


def counted(values: list[int]) -> bytearray:
    memory = bytearray(PAGE_SIZE * len(values))
    for page, value in enumerate(values):
        struct.pack_into("<I", memory, page * PAGE_SIZE, value)
    return memory


# The checks themselves: no QEMU


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([7, 7, 7, 7], Counters(7, 0)),
        ([8, 7, 7, 7], Counters(7, 1)),
        ([8, 8, 8, 7], Counters(7, 3)),
        ([0], Counters(0, 0)),
    ],
)
def test_counters_of_any_stopped_instant_are_consistent(values, found):
    assert check_counters(counted(values), 0, len(values)) == found


@pytest.mark.parametrize(
    "values", [[7, 8, 7, 7], [8, 7, 8, 7], [6, 7, 7, 7], [9, 7, 7, 7], [8, 8, 8, 6], [0, 7, 7, 7]]
)
def test_torn_lost_or_stale_page_is_found(values):
    with pytest.raises(CounterError):
        check_counters(counted(values), 0, len(values))


def test_counters_outside_of_memory_are_refused():
    with pytest.raises(ValueError, match="5 pages"):
        check_counters(counted([1, 1, 1, 1]), 0, 5)


def test_line_that_the_guest_cannot_have_printed_is_found():
    assert heartbeats_in(b"H 00000001\nH 0000000a\nH 0000") == [1, 10]
    with pytest.raises(CounterError):
        heartbeats_in(b"H 00000001\nH 00000\nH 00000003\n")


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 0, "pages": 1},
        {"start": (1 << 20) + 1, "pages": 1},
        {"start": 0xFFFFF000, "pages": 2},
        {"pages": 0, "pause": 0},
    ],
)
def test_guest_that_would_harm_itself_is_refused(wrong):
    with pytest.raises(ValueError):  # noqa: PT011 - which of them is in the parameters
        Guest(**wrong)


def test_differences_name_block_and_page(tmp_path):
    memory = tmp_path / "ram"
    memory.write_bytes(bytes(3 << 20))
    fill_random(memory, 1, 1 << 20, 2 << 20)
    left = memory.read_bytes()
    assert left[: 1 << 20].count(0) == 1 << 20
    assert left[1 << 20 :].count(0) < 3 << 14
    right = bytearray(left)
    right[0x123456] ^= 1
    assert differences({"pc.ram": left}, {"pc.ram": left}) == []
    assert differences({"pc.ram": left}, {"pc.ram": bytes(right)}) == [
        "pc.ram: 1 of 768 pages differ, the first at 0x123000, the last at 0x123000"
    ]
    assert len(differences({"a": left, "b": b""}, {"a": left[1:], "c": b""})) == 3


def test_joined_files_are_read_as_one(tmp_path):
    pieces = [b"abc", b"", b"defgh", b"i"]
    for number, piece in enumerate(pieces):
        tmp_path.joinpath(str(number)).write_bytes(piece)
    joined = JoinedBytes([FileBytes(tmp_path / str(number)) for number in range(4)])
    whole = b"".join(pieces)
    assert len(joined) == len(whole)
    for start in range(len(whole) + 1):
        for stop in range(len(whole) + 3):
            assert joined[start:stop] == whole[start:stop]


# The guest, in a real QEMU


@pytest.mark.qemu
@pytest.mark.parametrize("guest", GUESTS, ids=guest_name)
@pytest.mark.parametrize("machine", MACHINES)
def test_guest_starts_and_its_heartbeat_goes_on(machine, guest):
    with Qemu(machine=machine, guest=guest) as qemu:
        last = qemu.wait_heartbeat(5)
        assert qemu.heartbeats()[:last] == list(range(1, last + 1))
        qemu.stop()
        assert qemu.status() == "paused"
        counters = guest_counters(qemu.memory(), guest)
        assert counters.passes + 1 >= qemu.heartbeat()
        stopped_at = len(qemu.heartbeats())
        qemu.cont()
        qemu.wait_heartbeat(2)
        assert len(qemu.heartbeats()) >= stopped_at + 2


@pytest.mark.qemu
def test_counters_are_consistent_wherever_it_is_stopped_and_tampering_shows():
    guest = Guest.dirtying(16, pause=0)
    seen = set()
    with Qemu(guest=guest) as qemu:
        qemu.wait_heartbeat(2)
        for _ in range(8):
            qemu.stop()
            seen.add(guest_counters(qemu.memory(), guest))
            qemu.cont()
            qemu.wait_heartbeat(1)
        assert len({counters.passes for counters in seen}) == 8
        assert any(counters.cursor for counters in seen), "never stopped within a pass"

        qemu.stop()
        with qemu.memory_path.open("r+b") as memory:
            memory.seek(guest.start + 1000 * PAGE_SIZE)
            memory.write(struct.pack("<I", 1))
        with pytest.raises(CounterError, match="page 1000 "):
            guest_counters(qemu.memory(), guest)


@pytest.mark.qemu
@pytest.mark.parametrize("guest", GUESTS, ids=guest_name)
@pytest.mark.parametrize("machine", MACHINES)
def test_guest_survives_a_migration_over_a_unix_socket(machine, guest, tmp_path):
    uri = f"unix:{tmp_path}/s"
    with (
        Qemu(machine=machine, guest=guest, name="source") as source,
        Qemu(machine=machine, guest=guest, paused=True, incoming=uri, name="destination") as dest,
    ):
        source.wait_heartbeat(3)
        source.migrate(uri)
        assert_moved(source, dest, guest)


@pytest.mark.qemu
@pytest.mark.rdma
@pytest.mark.parametrize("machine", MACHINES)
def test_two_real_qemus_migrate_over_this_device(machine):
    """The control: what fails here as well is not ours."""
    guest = Guest.dirtying(4)
    uri = f"rdma:{device_address()[1]}:{free_port()}"
    with (
        Qemu(machine=machine, guest=guest, name="source") as source,
        Qemu(machine=machine, guest=guest, paused=True, incoming=uri, name="destination") as dest,
    ):
        source.set_capability("rdma-pin-all")
        source.set_parameter("max-bandwidth", 0)
        source.wait_heartbeat(3)
        source.migrate(uri)
        assert_moved(source, dest, guest)


def assert_moved(source: Qemu, dest: Qemu, guest: Guest) -> None:
    result = source.wait_migration()
    assert result["ram"]["total"] > source.memory_size
    assert source.wait_status("postmigrate") == "postmigrate"
    assert dest.wait_status("paused") == "paused"
    assert dest.serial() == b""
    assert differences(read_blocks(source), read_blocks(dest)) == []
    assert guest_counters(dest.memory(), guest) == guest_counters(source.memory(), guest)

    dest.cont()
    dest.wait_heartbeat(3)
    # It may have been stopped within a line: both ends together show that nothing was lost.
    printed = heartbeats_in(source.serial() + dest.serial())
    assert printed == list(range(1, len(printed) + 1))
    dest.stop()
    assert guest_counters(dest.memory(), guest).passes + 1 >= printed[-1]


@pytest.mark.qemu
def test_guest_paused_with_random_ram_keeps_it(tmp_path):
    uri = f"unix:{tmp_path}/s"
    with (
        Qemu(paused=True, name="source") as source,
        Qemu(paused=True, incoming=uri, name="destination") as dest,
    ):
        fill_random(source.memory_path, 7, 0, source.memory_size)
        source.set_parameter("max-bandwidth", 0)
        source.migrate(uri)
        source.wait_migration()
        dest.wait_status("paused", "prelaunch")
        here, there = read_blocks(source), read_blocks(dest)
        assert differences(here, there) == []
        with dest.memory_path.open("r+b") as memory:
            memory.seek(12345)
            memory.write(bytes([there["pc.ram"][12345:12346][0] ^ 0x10]))
        assert [line.split(":")[0] for line in differences(here, there)] == ["pc.ram"]


@pytest.mark.qemu
@pytest.mark.parametrize("machine", MACHINES)
def test_every_ram_block_can_be_read(machine):
    extra = ["-vga", "std", "-nic", "user,model=e1000"]
    with Qemu(machine=machine, extra=extra) as qemu:
        qemu.wait_heartbeat(1)
        qemu.stop()
        blocks = read_blocks(qemu)
        infos = {info.name: info for info in qemu.ram_blocks()}
        assert blocks.keys() == infos.keys()
        assert {name: len(data) for name, data in blocks.items()} == {
            name: info.used for name, info in infos.items()
        }
        kinds = sorted(name.rpartition("/")[2] for name in blocks)
        assert kinds == [
            "e1000.rom", "pc.bios", "pc.ram", "pc.rom", "rsdp", "table-loader", "tables",
            "vga.rom", "vga.vram",
        ]  # fmt: skip
        # Where the guest's processor can see a block as well, both ways show the same.
        bios = blocks["pc.bios"]
        assert qemu.pmemsave((1 << 32) - len(bios), len(bios)) == bios
        assert qemu.pmemsave(0, 0xA0000) == bytes(blocks["pc.ram"][:0xA0000])
        assert bytes(bios[-16:-15]) == b"\xea"  # the jump that a processor starts with
        assert next(data for name, data in blocks.items() if name.endswith("e1000.rom"))[:2] == (
            b"\x55\xaa"
        )


@pytest.mark.qemu
@pytest.mark.parametrize("name", MATRIX)
def test_ram_is_read_as_the_guest_sees_it(name):
    """Whatever it is made of; the guest counts across the border of its blocks."""
    guest, machine = Guest.dirtying(8), MATRIX[name]
    sizes = machine.blocks(64 * MIB)
    with Qemu(machine=machine.type, memory=sizes, guest=guest) as qemu:
        qemu.wait_heartbeat(2)
        qemu.stop()
        blocks = read_blocks(qemu)
        assert {name: len(blocks[name]) for name in sizes} == sizes
        assert len(qemu.memory()) == sum(sizes.values())
        guest_counters(qemu.memory(), guest)
        border = next(iter(sizes.values())) if len(sizes) > 1 else 20 * MIB
        assert guest.start < border < guest.end
        around = slice(border - MIB, border + MIB)
        assert qemu.memory()[around] == qemu.pmemsave(around.start, 2 * MIB)


@pytest.mark.qemu
def test_destination_that_lacks_the_last_device_fails_and_says_so(tmp_path):
    uri = f"unix:{tmp_path}/s"
    with (
        Qemu(extra=["-device", "virtio-rng-pci"], name="source") as source,
        Qemu(incoming=uri, name="destination") as dest,
    ):
        source.wait_heartbeat(1)
        source.migrate(uri)
        assert dest.wait_exit() == 1
        assert "virtio-rng" in dest.stderr()


# The harness


@pytest.mark.qemu
def test_leaving_ends_the_process_and_removes_its_files():
    with Qemu() as qemu:
        pid, directory = qemu.pid, qemu.memory_path.parent
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
    assert not directory.exists()
    with pytest.raises(HarnessError, match="closed"):
        qemu.status()


@pytest.mark.qemu
@pytest.mark.root
def test_qemu_of_another_user_can_be_driven_and_read():
    prefix = ["setpriv", "--bounding-set", "-ipc_lock", "--"]
    with Qemu(owner=(65534, 65534), prefix=["prlimit", "--core=0", "--"]) as qemu:
        assert Path(f"/proc/{qemu.pid}").stat().st_uid == 65534
        qemu.wait_heartbeat(2)
        qemu.stop()
        bios = read_blocks(qemu)["pc.bios"]
        assert qemu.pmemsave((1 << 32) - len(bios), len(bios)) == bios
    with Qemu(prefix=prefix) as qemu:
        status = Path(f"/proc/{qemu.pid}/status").read_text()
        bounding = int(status.partition("CapBnd:")[2].split()[0], 16)
        assert not bounding >> 14 & 1
        qemu.wait_heartbeat(1)


@pytest.mark.qemu
def test_unclosed_one_warns_and_ends_too():
    qemu = Qemu()
    pid = qemu.pid
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del qemu
        gc.collect()
    assert any(w.category is ResourceWarning and "unclosed" in str(w.message) for w in caught)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.qemu
def test_wait_that_runs_out_says_what_was_awaited():
    with Qemu(paused=True) as qemu:
        with pytest.raises(HarnessError, match="2 more heartbeats"):
            qemu.wait_heartbeat(2, deadline=0.2)
        with pytest.raises(HarnessError, match="run state running"):
            qemu.wait_status("running", deadline=0.2)


@pytest.mark.qemu
def test_qemu_that_does_not_start_or_dies_shows_its_stderr():
    with pytest.raises(HarnessError, match="no-such-device"):
        Qemu(extra=["-device", "no-such-device"])
    with Qemu(name="victim") as qemu:
        os.kill(qemu.pid, 9)
        with pytest.raises(HarnessError, match=r"victim.*\n.*ended with status -9"):
            qemu.wait_heartbeat(100)
        with pytest.raises(HarnessError, match="victim failed: query-status"):
            qemu.status()
