# SPDX-License-Identifier: Apache-2.0
"""Wrong, closed and strangely laid out objects give the Cython layer exceptions, never a crash."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import rdma_kit as kit

from rdma_mig.errors import LocalProtocolError, PeerGone
from rdma_mig.verbs.connector import connect
from rdma_mig.verbs.endpoint import EndpointOptions
from rdma_mig.verbs.events import EventChannel
from rdma_mig.verbs.listener import Listener
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Cancel, Deadline

pytestmark = pytest.mark.rdma


@pytest.fixture
def pair():
    """A connected endpoint, and the peer that it is connected to."""
    with kit.RawListener() as listener:
        accepted = kit.Worker(listener.accept)
        with kit.dial(listener.uri) as peer:
            yield peer.endpoint, accepted.result().endpoint


def calls(verbs):
    """Every function that takes a pyverbs object, with arguments that suit it otherwise."""
    return [
        verbs.event_channel_fd,
        verbs.async_fd,
        verbs.event_details,
        verbs.identifier,
        verbs.port_number,
        lambda cmid: verbs.bind_address(cmid, b"\2\0" + bytes(14)),
        lambda cmid: verbs.resolve_address(cmid, None, b"\2\0" + bytes(14), 1),
        lambda cmid: verbs.reject(cmid, b""),
        lambda cmid: verbs.connect(cmid, b"", qp_number=1, read_depth=0, retry=0, rnr_retry=0),
        verbs.local_address,
        verbs.peer_address,
        verbs.device_name,
        verbs.source_gid,
        verbs.path_attributes,
        lambda context: verbs.max_message_size(context, 1),
        lambda cmid: verbs.move_queue_pair(cmid, None, 1),
        verbs.fail_queue_pair,
        lambda pd: verbs.MemoryRegion(pd, 4096, 4096),
    ]


@pytest.mark.parametrize("wrong", [None, 7, "text", object(), type])
def test_objects_of_another_type(wrong):
    for call in calls(load()):
        with pytest.raises(TypeError, match=r"expected .*, not"):
            call(wrong)


def test_pyverbs_objects_of_another_kind(pair):
    verbs = load()
    endpoint, _ = pair
    for call in calls(verbs)[:-1]:
        with pytest.raises(TypeError, match=r"expected .*, not PD"):
            call(endpoint._pd)
    with pytest.raises(TypeError, match="expected PD, not QP"):
        verbs.MemoryRegion(endpoint._qp, 4096, 4096)


def test_closed_objects():
    verbs = load()
    with Closing(EventChannel()) as events:
        from pyverbs.cmid import CMID

        cmid = CMID(creator=events.raw)
        assert verbs.identifier(cmid)
        cmid.close()
        for call in (
            verbs.identifier, verbs.port_number, verbs.local_address, verbs.peer_address,
            verbs.device_name, verbs.source_gid, verbs.path_attributes,
        ):  # fmt: skip
            with pytest.raises(ValueError, match="CMID is closed"):
                call(cmid)
        raw = events.raw
    with pytest.raises(ValueError, match="CMEventChannel is closed"):
        verbs.event_channel_fd(raw)


class Closing:
    """Closes what has no context manager of its own."""

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        return self.what

    def __exit__(self, *_):
        self.what.close()


def test_connection_after_its_end(pair):
    endpoint, _ = pair
    verbs = load()
    queue, region = endpoint.queue, endpoint._regions
    endpoint.close()
    endpoint.close()
    for call in (
        lambda: queue.post_receive(0),
        lambda: queue.post_send(b"x"),
        queue.poll,
        lambda: queue.wait(verbs.WAIT_RECEIVE, 1),
        lambda: queue.wait(verbs.WAIT_SEND, 1),
    ):
        with pytest.raises(ValueError, match="is closed"):
            call()
    assert region == []
    assert queue.next_received() is None
    with pytest.raises(LocalProtocolError, match="closed by this end"):
        endpoint.wait(verbs.WAIT_RECEIVE, "anything", Deadline.after(1))
    endpoint.disconnect()


def test_write_queue_after_the_end_of_its_connection(pair):
    endpoint, _ = pair
    verbs = load()

    def stop(outcome):
        raise RuntimeError(f"outcome {outcome}")

    writes = verbs.WriteQueue(endpoint.queue, chunk_size=1 << 20, max_write=4096, interrupted=stop)
    writes.set_targets([(4096, 1, 4096, 1, 8192)])
    writes.open()
    endpoint.close()
    writes.save_page(0, 0, 4096)
    with pytest.raises(RuntimeError, match=f"outcome {verbs.FAILED}"):
        writes.flush()


def test_queue_whose_queue_pair_was_closed_under_it(pair):
    endpoint, _ = pair
    endpoint._qp.close()
    with pytest.raises(ValueError, match="is closed"):
        endpoint.queue.post_send(b"x")
    with pytest.raises(ValueError, match="is closed"):
        endpoint.queue.poll()


def test_queues_and_regions_that_were_never_set_up():
    verbs = load()
    queue = verbs.WorkQueue.__new__(verbs.WorkQueue)
    with pytest.raises(ValueError, match="no slot"):
        queue.post_receive(0)
    with pytest.raises(ValueError, match="is closed"):
        queue.poll()
    with pytest.raises(ValueError, match="is closed"):
        queue.wait(verbs.WAIT_RECEIVE, 1)
    region = verbs.MemoryRegion.__new__(verbs.MemoryRegion)
    assert region.closed
    region.close()
    with pytest.raises(ValueError, match="closed"):
        assert region.rkey


def test_work_queue_of_parts_that_do_not_fit(pair):
    verbs = load()
    endpoint, _ = pair
    cq = endpoint._cq
    region = verbs.MemoryRegion.__new__(verbs.MemoryRegion)
    given = {
        "cm_fd": 0, "cancel_fd": 0, "slots": 1, "slot_size": 64, "depth": 64,
        "probe_ms": 0, "silence_ms": 0,
    }  # fmt: skip
    with pytest.raises(TypeError):
        verbs.WorkQueue(endpoint._qp, cq, region=None, **given)
    with pytest.raises(ValueError, match="smaller than its slots"):
        verbs.WorkQueue(endpoint._qp, cq, region=region, **given)
    for name, value in {"slots": 17, "depth": 8}.items():
        with pytest.raises(ValueError, match=r"slots|smaller|entries"):
            verbs.WorkQueue(endpoint._qp, cq, region=region, **{**given, name: value})


@pytest.mark.parametrize(
    "address",
    [b"", b"\2\0", bytes(16), b"\2\0" + bytes(13), b"\2\0" + bytes(26), b"\x0a\0" + bytes(14)],
)
def test_addresses_shorter_or_longer_than_their_family(address):
    from pyverbs.cmid import CMID

    verbs = load()
    with Closing(EventChannel()) as events:
        cmid = CMID(creator=events.raw)
        try:
            with pytest.raises(ValueError, match="no struct sockaddr"):
                verbs.bind_address(cmid, address)
            with pytest.raises(ValueError, match="no struct sockaddr"):
                verbs.resolve_address(cmid, None, address, 1)
            with pytest.raises(ValueError, match="up to 148 bytes"):
                verbs.reject(cmid, bytes(300))
            with pytest.raises(ValueError, match="up to 56 bytes"):
                verbs.connect(cmid, bytes(57), qp_number=1, read_depth=0, retry=0, rnr_retry=0)
        finally:
            cmid.close()


# ---- a pyverbs that is laid out in another way ----


class Slots:
    """As wide as a pyverbs object, with Python objects where the C pointer would be."""

    __slots__ = ("a", "b", "c", "raw")
    qp_num = 0x123456


def test_handle_that_is_empty_or_points_at_something_else(monkeypatch):
    import pyverbs.qp

    verbs = load()
    monkeypatch.setattr(pyverbs.qp, "QP", Slots)
    fake = Slots()
    with pytest.raises(ValueError, match="is closed"):
        verbs.fail_queue_pair(fake)
    fake.raw = bytes(4096)
    with pytest.raises(RuntimeError, match=r"not laid out as rdma-mig expects.*number"):
        verbs.fail_queue_pair(fake)


def test_handle_that_points_nowhere(monkeypatch):
    import pyverbs.qp

    verbs = load()
    # What lies there in a ctypes object is a size: no address that could be read.
    monkeypatch.setattr(pyverbs.qp, "QP", ctypes.Array)
    fake = (ctypes.c_char * 77)()
    with pytest.raises(RuntimeError, match="cannot be read"):
        verbs.fail_queue_pair(fake)


@pytest.mark.parametrize(
    ("imported", "slots", "told"),
    [
        (
            "pyverbs.cmid, pyverbs.qp",
            "abcd",
            "another way than rdma-mig knows",
        ),
        ("pyverbs", "", "size changed"),  # pyverbs' own check of its modules
    ],
)
def test_pyverbs_whose_objects_have_another_size_is_not_loaded(imported, slots, told):
    code = f"""
        import pyverbs.base as base
        import {imported}
        class Other:
            __slots__ = tuple({slots!r})
        base.PyverbsCM = Other
        from rdma_mig.errors import HostError
        from rdma_mig.verbs.loading import load
        try:
            load()
        except HostError as error:
            print(error)
    """
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False, capture_output=True, text=True, timeout=kit.patience(30),
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("the RDMA layer cannot be loaded")
    assert told in shown.stdout


# ---- clients that come and go ----


def test_two_clients_at_once(address):
    with kit.RawListener() as listener:
        clients = [kit.Worker(lambda: dialled(listener.uri)) for _ in range(3)]
        time.sleep(0.5)
        listener.accept()
        outcomes = [client.result() for client in clients]
    assert sorted(outcomes) == ["connected", "rejected", "rejected"]


def dialled(uri):
    try:
        with kit.dial(uri):
            return "connected"
    except PeerGone:
        return "rejected"


def test_client_that_gave_up_is_passed_over(address):
    with kit.RawListener() as listener, Cancel() as cancel:
        port = listener.listener.address[1]
        with pytest.raises(Exception, match="no answer within"):
            connect(address, port, kit.PLAIN, cancel, EndpointOptions(connect_seconds=0.2))
        second = kit.Worker(lambda: dialled(listener.uri))
        peer = listener.accept()
        assert second.result() == "connected"
        with pytest.raises(PeerGone, match="closed the connection"):
            peer.receive()


def test_end_of_a_connection_is_known_to_every_later_wait(pair):
    endpoint, other = pair
    verbs = load()
    other.queue.post_send(b"last words")
    other.wait(verbs.WAIT_SEND, "a send", Deadline.after(kit.patience(5)))
    other.close()
    assert endpoint.wait_disconnected(kit.patience(5))
    endpoint.wait(verbs.WAIT_RECEIVE, "the last words", Deadline.after(kit.patience(5)))
    assert endpoint.queue.next_received() == b"last words"
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(PeerGone, match="closed the connection"):
            endpoint.wait(verbs.WAIT_RECEIVE, "more", Deadline.after(None))
        assert time.monotonic() - began < kit.patience(1)


def test_what_is_not_closed_warns(address):
    before = kit.resources()
    with Cancel() as cancel:
        for make in (
            lambda: Listener(address, 0, cancel, EndpointOptions()),
            lambda: kit.dial_and_forget(cancel),
        ):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made = make()
                del made
                gc.collect()
            assert any(
                w.category is ResourceWarning and "unclosed" in str(w.message) for w in caught
            )
    kit.settle(before)


def test_forked_child_leaves_the_parents_device_alone(pair):
    """A child that does nothing with verbs may come and go."""
    endpoint, other = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    other.queue.post_send(b"still there")
    endpoint.wait(load().WAIT_RECEIVE, "a message", Deadline.after(kit.patience(5)))
    assert endpoint.queue.next_received() == b"still there"
