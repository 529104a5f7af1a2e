# SPDX-License-Identifier: Apache-2.0
"""Every input that the fuzzers started from or have kept still does no harm, without a fuzzer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import corpus
from targets import TARGETS

from rdma_mig.wire.stream import StreamParser


def run(name: str, inputs: list[bytes]) -> None:
    for data in inputs:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_were_kept(name):
    inputs = corpus.kept(name)
    assert inputs, f"make fuzz has kept nothing for {name}"
    run(name, inputs)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_their_neighbours(name):
    """Each valid input, cut anywhere, with any one of its first bits turned over."""
    seeds = corpus.seeds(name)
    assert seeds
    for seed in seeds:
        TARGETS[name](seed)
        for size in range(len(seed)):
            TARGETS[name](seed[:size])
        for bit in range(min(8 * len(seed), 1024)):
            turned = bytearray(seed)
            turned[bit // 8] ^= 1 << bit % 8
            TARGETS[name](bytes(turned))


def test_no_file_is_left_over():
    names = {path.stem for path in Path(corpus.__file__).with_name("corpus").glob("*.hex")}
    assert names == set(TARGETS)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("handshake", "rdma_mig.wire.handshake.PrivateData.decode"),
        ("control", "rdma_mig.wire.control.ControlMessage.decode"),
        ("records", "rdma_mig.wire.records.ZeroRun.decode"),
        ("stream", "rdma_mig.wire.stream.StreamParser.next_event"),
        ("device_state", "rdma_mig.wire.description.DeviceStateScanner.feed"),
        ("return_path", "rdma_mig.wire.return_path.ReturnParser.next_message"),
        ("address", "rdma_mig.wire.address.RdmaAddress.parse"),
        ("manifest", "rdma_mig.snapshot.manifest.Manifest.decode"),
    ],
)
def test_decoder_that_raises_something_else_is_caught(name, decoder, monkeypatch):
    def broken(*_args: object, **_options: object) -> None:
        raise IndexError("index out of range")

    monkeypatch.setattr(decoder, broken)
    with pytest.raises(IndexError):
        run(name, corpus.seeds(name))


def test_decoder_that_looks_at_how_a_stream_is_cut_is_caught(monkeypatch):
    """A target that compared nothing would pass this, too."""
    feed = StreamParser.feed

    def forgetful(parser: StreamParser, data: bytes) -> None:
        feed(parser, data[:1] if len(data) == 2 else data)

    monkeypatch.setattr(StreamParser, "feed", forgetful)
    with pytest.raises(AssertionError):
        run("stream", [*corpus.seeds("stream"), *corpus.kept("stream")])
