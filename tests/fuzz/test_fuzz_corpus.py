# SPDX-License-Identifier: Apache-2.0
"""Every input that the fuzzers started from or have kept still does no harm, without a fuzzer."""

from __future__ import annotations

import pkgutil
import sys
import tracemalloc
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import corpus
from targets import TARGETS

from rdma_mig.errors import ProtocolError
from rdma_mig.wire.control import ControlHeader
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


@pytest.mark.parametrize("name", ["handshake", "control", "stream", "return_path"])
def test_what_a_real_qemu_sent(name):
    recorded = corpus.recorded(name)
    assert recorded
    run(name, recorded)


def peak(name: str, data: bytes) -> int:
    """Bytes that a target has allocated at once."""
    tracemalloc.start()
    try:
        TARGETS[name](data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_no_number_in_an_input_makes_it_allocate(name):
    """Each place of each valid input says once that huge things follow."""
    for seed in corpus.seeds(name):
        run(name, [seed])  # what is kept from the first use on
        most = 64 * 1024 + 64 * len(seed)
        assert peak(name, seed) < most
        for number in (2**60, 2**64 - 1, 0x0FFF_FFFF << 32):
            huge = number.to_bytes(8, "big")
            for at in range(len(seed)):
                lying = seed[:at] + huge + seed[at + 8 :]
                assert peak(name, lying) < most, lying.hex()


def test_decoder_that_believes_a_length_is_caught(monkeypatch):
    decode = ControlHeader.decode.__func__

    def believing(cls: type[ControlHeader], data: bytes) -> ControlHeader:
        bytearray(int.from_bytes(data[:4], "big") >> 4)
        return decode(cls, data)

    monkeypatch.setattr(ControlHeader, "decode", classmethod(believing))
    with pytest.raises(AssertionError):
        test_no_number_in_an_input_makes_it_allocate("control")


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("control", "rdma_mig.wire.control.ControlMessage.encode"),
        ("records", "rdma_mig.wire.records.ZeroRun.encode"),
        ("return_path", "rdma_mig.wire.return_path.Shut.encode"),
        ("handshake", "rdma_mig.wire.handshake.PrivateData.encode"),
        ("stream", "targets.encode_ram_start"),
    ],
)
def test_encoder_that_says_it_otherwise_is_caught(name, encoder, monkeypatch):
    """What was decoded has to become the same bytes again."""
    place, _, attribute = encoder.rpartition(".")
    original = getattr(pkgutil.resolve_name(place), attribute)

    def other(*arguments: object, **options: object) -> bytes:
        said = original(*arguments, **options)
        return said[:-1] + bytes([said[-1] ^ 1])

    seeds = corpus.seeds(name)
    monkeypatch.setattr(encoder, other)
    with pytest.raises((AssertionError, ProtocolError)):
        run(name, seeds)


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
