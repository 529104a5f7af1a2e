# SPDX-License-Identifier: Apache-2.0
"""Trace records: written as documented, read back the same, and refused where they are none."""

import re
from pathlib import Path

import pytest

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.trace import KINDS, TraceRecord


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_comes_back_as_it_was(kind):
    record = TraceRecord(1.25, kind, {name: at for at, name in enumerate(KINDS[kind])})
    line = record.encode()
    assert line.startswith(b'{"t":1.25,"kind":"')
    assert line.endswith(b"}\n")
    assert TraceRecord.decode(line) == record


def test_a_record_is_one_line_of_bounded_length_whatever_a_peer_calls_its_blocks():
    names = dict.fromkeys(KINDS["register"], "\U0001f600\n" * 5000)
    line = TraceRecord(1e9, "register", names).encode()
    assert len(line) < 16384
    assert line.count(b"\n") == 1


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("nothing", {}), ("round", {}), ("round", {"number": 1, "last": True, "more": 1})],
)
def test_what_is_not_documented_is_not_written(kind, fields):
    with pytest.raises(LocalProtocolError, match="no trace record"):
        TraceRecord(0, kind, fields).encode()


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"7", b"{}", b"\xff", b"[" * 100000,
     b'{"t":-1,"kind":"x"}', b'{"t":NaN,"kind":"x"}',
     b'{"t":true,"kind":"x"}', b'{"t":0,"kind":""}', b'{"t":0,"kind":"round","number":1}'],
)  # fmt: skip
def test_what_is_no_record(line):
    with pytest.raises(RemoteProtocolError):
        TraceRecord.decode(line)


def test_kinds_and_fields_of_a_newer_version_are_read():
    assert TraceRecord.decode(b'{"t":0,"kind":"new","x":1}').fields == {"x": 1}
    assert TraceRecord.decode(b'{"t":0,"kind":"round","number":1,"last":true,"x":1}').fields["x"]


def test_document_lists_the_kinds():
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
    documented = {kind: tuple(re.findall(r"`(\w+)`", fields)) for kind, fields in rows}
    assert documented == KINDS
