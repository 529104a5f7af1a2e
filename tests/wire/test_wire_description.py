# SPDX-License-Identifier: Apache-2.0
import json
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire import description
from rdma_mig.wire.description import (
    Description,
    DeviceInfo,
    DeviceStateScanner,
    parse_description,
)

TEXT = json.dumps(
    {
        "page_size": 4096,
        "devices": [
            {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": []},
            {"name": "0000:00:1f.2/ich9_ahci", "instance_id": 0},
        ],
    }
).encode()
CLOSING = bytes.fromhex("7e0000002a00")


def tail(state, text=TEXT):
    return state + b"\x00\x06" + struct.pack(">I", len(text)) + text


def fed(data, sizes=()):
    scanner = DeviceStateScanner()
    at = 0
    for size in [*sizes, len(data)]:
        scanner.feed(data[at : at + size])
        at += size
    return scanner


# Bytes that look like pieces of a description's header come up often here.
STATES = st.lists(
    st.sampled_from(
        [b"\0", b"\6", b"{", b"\0\6", b"\0\6\0\0\0\x30{", b"\0\6\0\6\0\0{", b"}", CLOSING]
    )
    | st.binary(max_size=8),
    max_size=40,
).map(b"".join)


@given(STATES, st.lists(st.integers(1, 50), max_size=40))
def test_complete_however_it_is_cut(state, sizes):
    scanner = fed(tail(state), sizes)
    assert scanner.complete
    assert scanner.eof_offset == len(state) + 1
    assert scanner.description == TEXT
    assert scanner.total == len(tail(state))


@given(STATES)
def test_complete_at_no_other_byte(state):
    data = tail(state)
    scanner = DeviceStateScanner()
    for at in range(len(data)):
        assert not scanner.complete, at
        scanner.feed(data[at : at + 1])
    assert scanner.complete
    scanner.feed(b"x")
    assert not scanner.complete
    with pytest.raises(LocalProtocolError, match="not ended"):
        _ = scanner.description


@given(st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=20))
def test_agrees_with_a_plain_search(data, sizes):
    found = [
        at
        for at in range(len(data) - 7)
        if data[at : at + 2] == b"\0\6"
        and int.from_bytes(data[at + 2 : at + 6], "big") == len(data) - at - 6
        and data[at + 6 : at + 7] == b"{"
    ]
    # Random bytes hold no JSON, so completeness would be an error; candidates are what is compared.
    scanner = fed(data, sizes)
    assert not scanner.complete
    ends = [scanner._base + at for at, end in scanner._candidates() if end == len(scanner._kept)]
    assert ends == [at for at in found if b"\0" not in data[at + 6 :]]


@given(STATES, st.binary(max_size=20), st.lists(st.integers(1, 50), max_size=20))
def test_closing_without_description(state, more, sizes):
    scanner = fed(state + CLOSING, sizes)
    assert scanner.closes_without_description
    assert not scanner.complete
    assert scanner.eof_offset == len(state + CLOSING)
    data = state + more
    expected = len(data) >= 6 and data[-6] == 0x7E and data[-1] == 0
    assert fed(data, sizes).closes_without_description == expected
    scanner.feed(tail(b"")[1:])
    assert scanner.complete, "the description comes after it"
    assert not scanner.closes_without_description


def test_nothing_has_ended_at_first():
    scanner = DeviceStateScanner()
    scanner.feed(b"")
    assert (scanner.total, scanner.complete, scanner.closes_without_description) == (
        0,
        False,
        False,
    )
    with pytest.raises(LocalProtocolError, match="not ended"):
        _ = scanner.eof_offset


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b'{"devices": {}}',
        b'{"page_size": 4096}',
        b'{"devices": []',
        b"{" * 100000,
        b'{"\xff',
    ],
)
def test_what_is_no_description_is_not_the_end(text):
    assert not fed(tail(b"state", text)).complete


def test_memory_stays_bounded_and_long_state_is_quick():
    scanner = DeviceStateScanner()
    # A length above the limit, then state that holds no NUL for longer than any description.
    scanner.feed(b"\0\6\xff\xff\xff\xff{")
    piece = b"\6{" * (256 << 10)
    began = time.process_time()
    for _ in range(200):
        scanner.feed(piece)
        assert len(scanner._kept) <= 12
    # Nor does a fitting length help what does not begin as an object.
    scanner.feed(b"\0\6\0\x10\0\0x" + piece)
    assert len(scanner._kept) <= 12
    # A feasible start keeps its bytes, until a NUL rules it out.
    scanner.feed(b"\0\6\0\x10\0\0{")
    scanner.feed(piece)
    assert len(scanner._kept) > len(piece)
    scanner.feed(b"\0")
    assert len(scanner._kept) <= 12
    scanner.feed(bytes(64 << 20))
    assert len(scanner._kept) <= 12
    scanner.feed(tail(b"\1"))
    assert scanner.complete
    assert time.process_time() - began < 5


def test_byte_by_byte_is_linear():
    text = b'{"devices": [], "page_size": 4096, "pad": "' + b"x" * 100000 + b'"}'
    scanner = DeviceStateScanner()
    for at in range(len(data := tail(bytes(50000), text))):
        scanner.feed(data[at : at + 1])
    assert scanner.complete


def test_description():
    assert parse_description(TEXT) == Description(
        4096,
        (DeviceInfo("timer", 0, "timer", 2), DeviceInfo("0000:00:1f.2/ich9_ahci", 0, None, None)),
    )


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)
INTS = st.integers(-(2**70), 2**70)


@given(
    st.integers(1, 2**70),
    st.lists(st.builds(DeviceInfo, NAMES, INTS, st.none() | NAMES, st.none() | INTS)),
    st.booleans(),
)
def test_description_round_trip(page_size, devices, ascii_only):
    listed = []
    for device in devices:
        entry = {"name": device.name, "instance_id": device.instance_id, "fields": [{"size": 1}]}
        if device.vmsd_name is not None:
            entry["vmsd_name"] = device.vmsd_name
        if device.version is not None:
            entry["version"] = device.version
        listed.append(entry)
    value = {"page_size": page_size, "devices": listed, "more": [None]}
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_description(raw) == Description(page_size, tuple(devices))


def described(**device):
    entry = {"name": "timer", "instance_id": 0} | device
    return json.dumps({"page_size": 4096, "devices": [entry]}).encode()


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"{", "is no JSON"),
        (TEXT + b"x", "is no JSON"),
        (b"\xff\xfe{\0}\0", "is no JSON"),
        (b"[]", "is a list, allowed is an object"),
        (b"[" * 1000000, "nested too deeply"),
        (b'{"a":' * 1000000, "nested too deeply"),
        (b'{"page_size": NaN, "devices": []}', "is no JSON"),
        (b'{"page_size": 1' + b"0" * 10000 + b', "devices": []}', "is no JSON"),
        (b'{"devices": []}', "page_size of the description is missing"),
        (b'{"page_size": "4096", "devices": []}', "page_size of the description is a str"),
        (b'{"page_size": true, "devices": []}', "page_size of the description is a bool"),
        (b'{"page_size": 4096.0, "devices": []}', "page_size of the description is a float"),
        (b'{"page_size": 0, "devices": []}', "not positive"),
        (b'{"page_size": 4096}', "devices of the description is missing"),
        (b'{"page_size": 4096, "devices": {}}', "devices of the description is a dict"),
        (b'{"page_size": 4096, "devices": [1]}', "device 0 of the description is a int"),
        (described(name=None), "name of device 0 of the description is missing"),
        (described(name=7), "name of device 0 of the description is a int"),
        (described(name=""), "is empty"),
        (described(name="a\x1b[2J"), "cannot be printed"),
        (described(name="\ud800"), "cannot be printed"),
        (described(instance_id=None), "instance_id of device 0 of the description is missing"),
        (described(instance_id="0"), "instance_id of device 0 of the description is a str"),
        (described(instance_id=[[]]), "instance_id of device 0 of the description is a list"),
        (described(vmsd_name=1), "vmsd_name of device 0"),
        (described(version=1.5), "version of device 0 of the description is a float"),
    ],
)
def test_hostile_descriptions(raw, match):
    with pytest.raises(RemoteProtocolError, match=match) as caught:
        parse_description(raw)
    assert len(caught.value.message) < 300


def test_too_long_a_description():
    with pytest.raises(RemoteProtocolError, match="67108865 bytes, allowed are 67108864"):
        parse_description(b"{" + bytes(64 << 20))


def test_limits_of_the_length(monkeypatch):
    monkeypatch.setattr(description, "DESCRIPTION_MAX", len(TEXT))
    assert fed(tail(b"state")).complete
    assert parse_description(TEXT).page_size == 4096
    monkeypatch.setattr(description, "DESCRIPTION_MAX", len(TEXT) - 1)
    assert not fed(tail(b"state")).complete
    with pytest.raises(RemoteProtocolError, match="allowed are"):
        parse_description(TEXT)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "instance_id", "vmsd_name", "version", "x"]), inner, max_size=5
        )
    ),
    max_leaves=20,
)


@given(st.fixed_dictionaries({}, optional={"page_size": JSON, "devices": JSON}))
def test_any_json_parses_or_is_refused(value):
    try:
        parsed = parse_description(json.dumps(value).encode())
    except RemoteProtocolError:
        return
    assert len(parsed.devices) == len(value["devices"])
