# SPDX-License-Identifier: Apache-2.0
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.return_path import Pong, ReturnParser, ReturnType, Shut, SwitchoverAck

U32 = st.integers(0, 2**32 - 1)
BEFORE_THE_END = st.lists(st.builds(Pong, U32) | st.just(SwitchoverAck()), max_size=6)


def parse(data, cuts=()):
    """All frames of these bytes, cut at these places."""
    parser = ReturnParser()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        parser.feed(data[start:end])
        while (message := parser.next_message()) is not None:
            found.append(message)
    return found


def test_bytes_of_qemu():
    assert Pong(1).encode().hex() == "0002000400000001"
    assert Shut(0).encode().hex() == "0001000400000000"
    assert parse(bytes.fromhex("0002000400000001 0001000400000000")) == [Pong(1), Shut(0)]


@given(BEFORE_THE_END, st.none() | st.builds(Shut, U32), st.data())
def test_round_trip_however_it_is_cut(frames, last, data):
    frames = [*frames, *([last] if last else [])]
    raw = b"".join(frame.encode() for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    assert parse(raw, cuts) == frames


@given(BEFORE_THE_END, st.data())
def test_what_is_not_whole_is_waited_for(frames, data):
    raw = b"".join(frame.encode() for frame in frames) + Shut(7).encode()
    assert parse(raw[: data.draw(st.integers(len(raw) - 8, len(raw) - 1))]) == frames


@given(st.integers(0, 2**16 - 1).filter(lambda kind: kind not in set(ReturnType)))
def test_unknown_type(kind):
    with pytest.raises(RemoteProtocolError, match=f"type {kind}, which is unknown"):
        parse(struct.pack(">HH", kind, 0))


@pytest.mark.parametrize("kind", ["REQ_PAGES_ID", "REQ_PAGES", "RECV_BITMAP", "RESUME_ACK"])
def test_frames_of_postcopy(kind):
    with pytest.raises(RemoteProtocolError, match=f"{kind}, which belongs to postcopy"):
        parse(struct.pack(">HH", ReturnType[kind], 4))


@given(st.sampled_from([(1, 4), (2, 4), (7, 0)]), st.integers(0, 2**16 - 1))
def test_length_that_lies_is_refused_before_its_bytes_are_awaited(kind, length):
    number, allowed = kind
    header = struct.pack(">HH", number, length)
    if length == allowed:
        assert parse(header) == ([SwitchoverAck()] if number == 7 else [])
        return
    with pytest.raises(RemoteProtocolError, match=f"{length} bytes, allowed are {allowed}"):
        parse(header)


def test_nothing_follows_shut():
    with pytest.raises(RemoteProtocolError, match="behind SHUT"):
        parse(Shut(0).encode() + b"\0")


@pytest.mark.parametrize("wrong", [Shut(-1), Shut(1 << 32), Pong(-1), Pong(1 << 32)])
def test_values_that_do_not_fit(wrong):
    with pytest.raises(LocalProtocolError, match="allowed are 0 to"):
        wrong.encode()
