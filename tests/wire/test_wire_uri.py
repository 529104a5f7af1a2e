# SPDX-License-Identifier: Apache-2.0
"""Migration URIs of all transports; hosts and ports are in test_wire_address.py."""

from __future__ import annotations

import pytest

from rdma_mig.errors import UsageError
from rdma_mig.wire.uri import (
    ExecAddress,
    FdAddress,
    FileAddress,
    RdmaAddress,
    TcpAddress,
    UnixAddress,
    parse_uri,
)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("rdma:192.0.2.1:4444", RdmaAddress("192.0.2.1", 4444)),
        ("tcp:192.0.2.1:4444", TcpAddress("192.0.2.1", 4444)),
        ("tcp:[2001:db8::1]:1", TcpAddress("2001:db8::1", 1)),
        ("unix:/run/m.sock", UnixAddress("/run/m.sock")),
        ("unix:a,b:c", UnixAddress("a,b:c")),
        ("fd:7", FdAddress(7)),
        ("exec:cat > 'a:b' | x", ExecAddress("cat > 'a:b' | x")),
        ("file:/a/b", FileAddress("/a/b")),
        ("file:a,b", FileAddress("a,b")),
        ("file:a,offset=4096", FileAddress("a", 4096)),
        ("file:a,offset=010", FileAddress("a", 10)),
    ],
)
def test_uri_is_parsed_and_said_again(uri: str, address: object):
    parsed = parse_uri(uri, listening=False)
    assert (type(parsed), parsed) == (type(address), address)
    assert parse_uri(str(parsed), listening=False) == parsed


def test_offset_has_units():
    assert parse_uri("file:a,offset=0x10", listening=True) == FileAddress("a", 16)
    assert parse_uri("file:a,offset=2M", listening=True) == FileAddress("a", 2 << 20)


def test_same_host_and_port_of_two_schemes_differ():
    assert parse_uri("tcp:a:1", listening=False) != parse_uri("rdma:a:1", listening=False)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("", "no scheme"),
        ("/tmp/x", "no scheme"),
        ("vsock:1:2", "scheme 'vsock'"),
        ("TCP:a:1", "scheme 'TCP'"),
        ("unix:", "nothing behind"),
        ("exec:", "nothing behind"),
        ("file:a\0b", "NUL"),
        ("unix:" + "x" * 108, "108 bytes, allowed are 107"),
        ("fd:name", "getfd"),
        ("fd:-1", "no number"),
        ("fd:9999999999", "no number"),
        ("file:a,offset=", "offset ''"),
        ("file:a,offset=-1", "offset '-1'"),
        ("file:a,offset=99999999999T", "offset"),
        ("file:,offset=1", "behind a path"),
        ("tcp:a:0", "a port of 0 is for listening only"),
        ("tcp::4444", "empty host"),
        ("tcp:a", "write tcp:HOST:PORT"),
    ],
)
def test_what_is_no_uri_is_refused_with_the_remedy(uri: str, said: str):
    with pytest.raises(UsageError) as refused:
        parse_uri(uri, listening=False)
    assert said in str(refused.value)
    assert refused.value.remedy
