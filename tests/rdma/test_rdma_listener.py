# SPDX-License-Identifier: Apache-2.0
"""What a listener takes from whom, and what is on disk when a source may let go of its guest."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import rdma_kit as kit

from rdma_mig.errors import HostError, PeerGone
from rdma_mig.snapshot import Snapshot
from rdma_mig.wire.control import ControlType
from rdma_mig.wire.stream import encode_hook

pytestmark = pytest.mark.rdma


def warnings(end: kit.End) -> list[str]:
    return [event.message for event in end.events if hasattr(event, "message")]


def test_only_who_is_allowed_is_served(room: Path):
    with kit.incoming(room / "vm", host="[::]", allow=(f"{kit.ipv6_address()}/128",)) as end:
        port = end.uri.rpartition(":")[2]
        for _ in range(2):
            with (
                pytest.raises(PeerGone, match=r"rejected .* \(--allow\)"),
                kit.dial(f"rdma:{kit.device()[1]}:{port}"),
            ):
                pytest.fail("it was accepted")
        with kit.dial(f"rdma:[{kit.ipv6_address()}]:{port}") as peer:
            kit.until("device state sent", kit.act_as_source(peer))
            peer.close()
            end.succeed()
    assert warnings(end) == [f"turned {kit.device()[1]} away: --allow does not name it"] * 2


@pytest.mark.parametrize(
    ("allow", "host", "warned"),
    [((), "0.0.0.0", True), ((), "", False), (("0.0.0.0/0",), "0.0.0.0", False)],
)
def test_listening_to_everybody_is_warned_of(room: Path, allow: tuple, host: str, warned: bool):
    with kit.incoming(room / "vm", host=host, allow=allow) as end:
        assert any("crosses the wire in clear" in text for text in warnings(end)) == warned


def memfds() -> int:
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory that is being listed
            found += os.readlink(link).startswith("/memfd:")
    return found


def test_guest_larger_than_allowed_is_refused_before_anything_is_allocated(room: Path):
    with kit.incoming(room / "vm", max_ram=kit.MIB) as end, kit.dial(end.uri) as peer:
        peer.stream(kit.HEAD + encode_hook())
        error = end.fail(HostError, r"announces 4 MiB of RAM and --max-ram allows 1 MiB")
        assert "still the source's" in str(error)
        assert memfds() == 0
    assert not list(room.iterdir())


@pytest.mark.parametrize("sync_before", [True, False], ids=["before", "after"])
def test_what_is_on_disk_when_the_source_may_go_on(room: Path, sync_before: bool):
    with kit.incoming(room / "vm", sync_before=sync_before) as end, kit.dial(end.uri) as peer:
        steps = kit.act_as_source(peer)
        kit.until("RAM handed over", steps)
        # The READY behind the last phase is the commit point.
        peer.expect(ControlType.READY)
        (partial,) = room.iterdir()
        with (partial / "ram" / "0.raw").open("rb") as file:
            assert (file.read(4096) == b"\x5a" * 4096) == sync_before
        peer.close()
        error = end.fail(PeerGone)
        assert "kept in" in str(error)
    (kept,) = room.iterdir()
    assert kept.name == "vm.incomplete"
    assert (kept / "ram" / "0.raw").read_bytes()[:4096] == b"\x5a" * 4096


def test_ram_that_was_on_disk_before_makes_a_whole_snapshot(room: Path):
    with kit.incoming(room / "vm", sync_before=True) as end, kit.dial(end.uri) as peer:
        kit.until("device state sent", kit.act_as_source(peer))
        peer.close()
        end.succeed()
    with Snapshot.open(room / "vm") as snapshot:
        snapshot.verify()
