# SPDX-License-Identifier: Apache-2.0
"""What others find through entry points; a whole migration by them needs a device."""

from __future__ import annotations

import pytest

from rdma_mig import plugin
from rdma_mig.errors import UsageError
from rdma_mig.migration.guests import ProcessGuest, SnapshotGuest


def test_transport_is_found_by_its_scheme():
    transport = plugin.find_transport("rdma")
    assert (transport.scheme, transport.api_version) == ("rdma", plugin.API_VERSION)
    with (
        plugin.Migration() as migration,
        pytest.raises(UsageError, match="an option that RDMA does not have"),
    ):
        transport.start_incoming(
            "rdma:127.0.0.1:0", migration=migration, process=lambda *_: None, no_such_option=1
        )


@pytest.mark.parametrize("scheme", ["tcp", "unix", "fd", "exec", "file"])
def test_plain_transports_take_their_own_scheme_and_options_only(scheme):
    transport = plugin.find_transport(scheme)
    assert (transport.scheme, transport.api_version) == (scheme, plugin.API_VERSION)
    with plugin.Migration() as migration, plugin.GuestRam([]) as ram:
        nothing = {"migration": migration, "save": lambda *_: None, "ram": ram}
        with pytest.raises(UsageError, match=f"no URI of the transport '{scheme}'"):
            transport.start_outgoing("rdma:127.0.0.1:4444", **nothing)
        uri = "tcp:127.0.0.1:1" if scheme == "tcp" else f"{scheme}:1"
        with pytest.raises(UsageError, match=f"an option that {scheme} does not have.*pin_all"):
            transport.start_outgoing(uri, **nothing, pin_all=True)


def test_guests_are_found_and_are_guests(tmp_path):
    assert plugin.find_guest("snapshot") is SnapshotGuest
    assert plugin.find_guest("process") is ProcessGuest
    with ProcessGuest("toy", [plugin.RamBlock("toy.ram", 4096)]) as guest:
        assert isinstance(guest, plugin.Guest)


def test_unknown_or_other_version_is_refused(monkeypatch):
    with pytest.raises(UsageError, match=r"no 'tcp2' is installed in rdma_mig\.transports"):
        plugin.find_transport("tcp2")
    for name in ("Rdma", "Tcp"):
        monkeypatch.setattr(f"rdma_mig.migration.transports.{name}Transport.api_version", 0)
        with pytest.raises(UsageError, match="written for version 0"):
            plugin.find_transport(name.lower())


class Asked:
    """A guest, and its tracker, that note what is asked of them in which order."""

    def __init__(self, *, atomic):
        self.atomic = atomic
        self.calls = []
        self.tracker = self

    def start(self):
        self.calls.append("start")

    def harvest(self, index, into):
        self.calls.append(f"harvest {index}")
        into.set(index)
        return 1

    def stop(self):
        self.calls.append("stop")

    def resume(self):
        self.calls.append("resume")


@pytest.mark.parametrize("atomic", [True, False])
def test_guest_rests_while_a_tracker_is_asked_that_would_lose_writes(atomic):
    guest = Asked(atomic=atomic)
    bitmaps = [plugin.DirtyBitmap(4), plugin.DirtyBitmap(4)]
    with plugin.Tracking(guest) as tracking:
        assert tracking.harvest(bitmaps) == 2
        tracking.harvest(bitmaps, at_rest=True)
    both = ["harvest 0", "harvest 1"]
    if atomic:
        assert guest.calls == ["start", *both, *both, "stop"]
    else:
        once = ["stop", "start", "resume", "stop", *both, "resume"]
        assert guest.calls == [*once, *both, "stop"]
    assert [bitmap[index] for index, bitmap in enumerate(bitmaps)] == [True, True]


def test_guest_without_tracker_has_written_nothing():
    with ProcessGuest("toy", [plugin.RamBlock("toy.ram", 4096)]) as guest:
        bitmaps = [plugin.DirtyBitmap(1)]
        with plugin.Tracking(guest) as tracking:
            assert tracking.harvest(bitmaps) == 0
        assert bitmaps[0].count() == 0
