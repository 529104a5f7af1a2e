# SPDX-License-Identifier: Apache-2.0
import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.errors import UsageError
from rdma_mig.wire.address import RdmaAddress

HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,40}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
).filter(lambda host: not re.fullmatch(r"[0x.:]*|::ffff:.*", host))


@given(HOSTS, st.integers(1, 65535), st.booleans())
def test_round_trip(host, port, listening):
    address = RdmaAddress(host, port)
    assert RdmaAddress.parse(str(address), listening=listening) == address


@pytest.mark.parametrize(
    ("uri", "host", "port"),
    [
        ("rdma:192.0.2.1:4444", "192.0.2.1", 4444),
        ("rdma:0.0.0.0:4444", "0.0.0.0", 4444),
        ("rdma:[::]:4444", "::", 4444),
        ("rdma:[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("rdma:host.example:65535", "host.example", 65535),
        ("rdma:host:04444", "host", 4444),
        ("rdma:host:4444,ipv4=on", "host", 4444),
        ("rdma:host:4444,ipv4=on,ipv6=off", "host", 4444),
        ("rdma:[::1]:4444,ipv6", "::1", 4444),
    ],
)
def test_accepted(uri, host, port):
    assert RdmaAddress.parse(uri, listening=True) == RdmaAddress(host, port)


def test_port_0_is_for_listening():
    assert RdmaAddress.parse("rdma:[::]:0", listening=True) == RdmaAddress("::", 0)
    with pytest.raises(UsageError, match=r"port '0', allowed are 1 to 65535; .*listening only"):
        RdmaAddress.parse("rdma:host:0", listening=False)


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("", "has no scheme, allowed is rdma"),
        ("host", "has no scheme"),
        ("tcp:host:4444", "has scheme 'tcp', allowed is rdma"),
        ("x-rdma:host:4444", "has scheme 'x-rdma'"),
        ("RDMA:host:4444", "has scheme 'RDMA'"),
        ("host:4444", "has scheme 'host'"),
        ("rdma:", "has no port"),
        ("rdma:host", "has no port"),
        ("rdma:host:", "has no port"),
        ("rdma:[::1]", "has no port"),
        ("rdma:[::1]4444", "has no port"),
        ("rdma:[::1", "lacks the bracket"),
        ("rdma:::1:4444", "more than one colon"),
        ("rdma:fe80::1:4444", "put an IPv6 address in brackets"),
        ("rdma://host:4444", "no name or address"),
        ("rdma:ho st:4444", "no name or address"),
        ("rdma:ho\nst:4444", "no name or address"),
        ("rdma:[host]:4444", "no IPv6 address"),
        ("rdma:[1.2.3.4]:4444", "no IPv6 address"),
        ("rdma:host:65536", "port '65536', allowed are 1 to 65535"),
        ("rdma:host:-1", "port '-1'"),
        ("rdma:host:+1", "port '\\+1'"),
        ("rdma:host: 1", "port ' 1'"),
        ("rdma:host:0x10", "port '0x10'"),
        ("rdma:host:ssh", "port 'ssh'"),
        ("rdma:host:\u0661", "port"),
        ("rdma:host:" + "1" * 10000, "port '1111"),
        ("rdma:host:4444,foo", "unknown option 'foo'"),
        ("rdma:host:4444,", "unknown option ''"),
    ],
)
def test_refused_with_a_remedy(uri, match):
    with pytest.raises(UsageError, match=match) as caught:
        RdmaAddress.parse(uri, listening=False)
    assert caught.value.remedy


@pytest.mark.parametrize("uri", ["rdma::4444", "rdma:[]:4444"])
def test_an_empty_host(uri):
    with pytest.raises(UsageError, match=r"empty host; .*0\.0\.0\.0 or \[::\]"):
        RdmaAddress.parse(uri, listening=True)
    with pytest.raises(UsageError, match="empty host; name the host"):
        RdmaAddress.parse(uri, listening=False)


# What getaddrinfo() takes for every address, or for this host where it is a destination.
EVERYWHERE = [
    "*", "0", "00", "0x0", "0X0", "0.0", "0.0.0", "0x0.0.0.00", "000.000.000.000", "[::0]",
    "[0::0]", "[0:0:0:0:0:0:0:0]", "[::0.0.0.0]", "[::ffff:0.0.0.0]", "[::FFFF:0:0]", "[::%lo]",
]  # fmt: skip


@pytest.mark.parametrize("host", EVERYWHERE)
def test_every_address_is_written_in_one_way_only(host):
    with pytest.raises(UsageError, match=r"a way to write every address.*0\.0\.0\.0 or \[::\]"):
        RdmaAddress.parse(f"rdma:{host}:4444", listening=True)


@pytest.mark.parametrize("host", [*EVERYWHERE, "0.0.0.0", "[::]"])
def test_every_address_is_no_destination(host):
    with pytest.raises(UsageError, match="is for listening only; name the host"):
        RdmaAddress.parse(f"rdma:{host}:4444", listening=False)


@pytest.mark.parametrize("listening", [True, False])
def test_ipv4_in_the_form_of_ipv6(listening):
    with pytest.raises(UsageError, match=r"which RDMA does not take; write 192\.0\.2\.1"):
        RdmaAddress.parse("rdma:[::ffff:192.0.2.1]:4444", listening=listening)


@given(st.from_regex(r"(0[xX]?[0-9a-fA-F]{0,9}|[1-9][0-9]{0,9})(\.(0[xX]?)?[0-9a-f]{0,4}){0,3}"))
def test_no_number_that_listens_everywhere_is_left(host):
    host = host.strip()
    try:
        RdmaAddress.parse(f"rdma:{host}:4444", listening=True)
    except UsageError:
        return
    try:
        found = socket.getaddrinfo(host, 1, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return
    assert host == "0.0.0.0" or "0.0.0.0" not in [address[0] for *_, address in found]


@given(st.text(max_size=40), st.booleans())
def test_any_text_parses_or_is_refused(text, listening):
    for uri in (text, f"rdma:{text}", f"rdma:{text}:1", f"rdma:h:{text}", f"rdma:[{text}]:1"):
        try:
            address = RdmaAddress.parse(uri, listening=listening)
        except UsageError:
            continue
        assert RdmaAddress.parse(str(address), listening=listening) == address


@pytest.mark.parametrize("fill", ["rdma:{}", "{}:h:1", "rdma:{}@:1", "rdma:h:1,{}", "rdma:[{}]:1"])
def test_messages_stay_short(fill):
    with pytest.raises(UsageError) as caught:
        RdmaAddress.parse(fill.format("x" * 100000), listening=True)
    assert len(str(caught.value)) < 400
