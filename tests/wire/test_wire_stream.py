# SPDX-License-Identifier: Apache-2.0
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.stream import (
    Capabilities,
    Command,
    CommandType,
    Hook,
    MachineUuid,
    RamEnd,
    RamPart,
    RamStart,
    SectionEnd,
    StreamBlock,
    StreamHead,
    StreamParser,
    TargetPageBits,
    encode_command,
    encode_eos,
    encode_footer,
    encode_head,
    encode_hook,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)

IGNORE_SHARED = Capabilities(("x-ignore-shared",))
HEAD = encode_head("pc-q35-7.2")
BLOCKS = [StreamBlock("pc.ram", 0x2000000), StreamBlock("pc.bios", 0x40000)]
START = encode_ram_start(2, BLOCKS)
PHASE = encode_hook() + encode_eos()


def parse(data, sizes=()):
    """Feed *data* in pieces of *sizes*, the rest at once; return events and device state."""
    parser = StreamParser()
    events = []
    state = b""
    at = 0
    for size in [*sizes, len(data)]:
        parser.feed(data[at : at + size])
        at += size
        while (event := parser.next_event()) is not None:
            events.append(event)
        if parser.in_device_state:
            state += parser.remainder()
    return events, state


def refused(data, match):
    """The stream is refused at the same place whether it arrives at once or byte by byte."""
    for sizes in ((), [1] * len(data)):
        with pytest.raises(RemoteProtocolError, match=match) as caught:
            parse(data, sizes)
        assert type(caught.value) is RemoteProtocolError
    return caught.value


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)
SUBSECTIONS = st.lists(
    st.one_of(
        st.builds(TargetPageBits, st.integers(10, 30)),
        st.builds(Capabilities, st.lists(NAMES, max_size=5).map(tuple)),
        st.builds(MachineUuid, st.binary(min_size=16, max_size=16)),
    ),
    unique_by=type,
    max_size=3,
)
COMMANDS = st.sampled_from(
    [
        Command(CommandType.OPEN_RETURN_PATH, b""),
        Command(CommandType.PING, b"\0\0\0\1"),
        Command(CommandType.POSTCOPY_ADVISE, b""),
        Command(CommandType.POSTCOPY_ADVISE, struct.pack(">QQ", 4096, 4096)),
        Command(CommandType.SWITCHOVER_START, b""),
    ]
)


@st.composite
def streams(draw):
    """A whole stream and the events that it stands for."""
    machine = draw(st.none() | NAMES)
    subsections = draw(SUBSECTIONS) if machine else []
    head = encode_head(machine, subsections)
    data = [head]
    events = [StreamHead(head, machine, tuple(subsections))]
    shared = any("x-ignore-shared" in getattr(item, "names", ()) for item in subsections)

    def commands():
        for command in draw(st.lists(COMMANDS, max_size=3)):
            data.append(encode_command(command.command, command.data))
            events.append(command)

    section_id = draw(st.integers(0, 2**32 - 1))
    footers = draw(st.booleans())

    def phase(kind):
        for _ in range(draw(st.integers(0, 2))):
            data.append(encode_hook())
            events.append(Hook())
        data.append(encode_eos())
        if footers:
            data.append(encode_footer(section_id))
        events.append(SectionEnd(kind, footers))

    commands()
    blocks = tuple(
        StreamBlock(
            name,
            4096 * draw(st.integers(1, 2**30)),
            guest_address=draw(st.integers(0, 2**64 - 1)) if shared else None,
        )
        for name in draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    )
    data.append(encode_ram_start(section_id, blocks))
    total = sum(block.length for block in blocks)
    events.append(RamStart(section_id, 0, 4, total, blocks))
    phase("start")
    for _ in range(draw(st.integers(0, 3))):
        commands()
        data.append(encode_section_part(section_id))
        events.append(RamPart(section_id))
        phase("part")
    commands()
    data.append(encode_section_end(section_id))
    events.append(RamEnd(section_id))
    phase("end")
    # Without footers the lookahead must not take device state for one.
    state = b"\x04" + draw(st.binary(max_size=100))
    return b"".join(data), events, state


@given(streams(), st.lists(st.integers(1, 60), max_size=60))
def test_round_trip_however_it_is_cut(stream, sizes):
    data, events, state = stream
    assert parse(data + state, sizes) == (events, state)


@given(streams())
def test_round_trip_byte_by_byte(stream):
    data, events, state = stream
    assert parse(data + state, [1] * len(data + state)) == (events, state)


@given(streams(), st.data())
def test_a_truncated_stream_waits(stream, data):
    encoded, events, _state = stream
    parser = StreamParser()
    parser.feed(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    found = []
    while (event := parser.next_event()) is not None:
        found.append(event)
    assert found == events[: len(found)]
    assert len(found) < len(events)
    assert parser.next_event() is None
    assert not parser.in_device_state
    assert parser.awaiting


@given(streams(), st.data())
def test_damage_is_refused_or_parsed_and_nothing_else(stream, data):
    encoded = bytearray(stream[0] + stream[2])
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    sizes = data.draw(st.lists(st.integers(1, 60), max_size=30))
    outcomes = []
    for cut in ((), sizes, [1] * len(encoded)):
        try:
            outcomes.append(parse(bytes(encoded), cut))
        except RemoteProtocolError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_head_are_refused_or_parsed(data):
    for prefix in (b"", HEAD, HEAD + START, HEAD + START + PHASE):
        try:
            parse(prefix + data)
        except RemoteProtocolError:
            continue


def test_bytes_of_every_encoder():
    assert HEAD.hex() == "5145564d00000003" + "07" + "0000000a" + b"pc-q35-7.2".hex()
    assert encode_head(None).hex() == "5145564d00000003"
    assert encode_hook().hex() == "0000000000000080"
    assert encode_eos().hex() == "0000000000000010"
    assert encode_footer(2).hex() == "7e00000002"
    assert encode_section_part(2).hex() == "0200000002"
    assert encode_section_end(2).hex() == "0300000002"
    assert encode_command(CommandType.SWITCHOVER_START).hex() == "08000b0000"
    assert encode_command(CommandType.PING, b"\0\0\0\1").hex() == "080002000400000001"
    assert (
        bytes.fromhex("01 00000002 03 72616d 00000000 00000004 0000000002040004")
        + b"\6pc.ram"
        + struct.pack(">Q", 0x2000000)
        + b"\7pc.bios"
        + struct.pack(">Q", 0x40000)
    ) == START


def test_hook_is_handed_over_before_anything_behind_it_is_needed():
    parser = StreamParser()
    parser.feed(HEAD + START + encode_hook())
    kinds = [type(parser.next_event()) for _ in range(4)]
    assert kinds == [StreamHead, RamStart, Hook, type(None)]
    assert parser.buffered == 0
    parser.feed(encode_eos())
    assert parser.next_event() is None, "a footer may follow"
    parser.feed(b"\x02")
    assert parser.next_event() == SectionEnd("start", False)
    assert parser.buffered == 1


def test_head_ends_before_the_byte_that_shows_its_end():
    parser = StreamParser()
    parser.feed(HEAD)
    assert parser.next_event() is None
    parser.feed(b"\x01")
    assert parser.next_event() == StreamHead(HEAD, "pc-q35-7.2", ())
    assert parser.buffered == 1


def test_remainder_hands_over_each_byte_once():
    parser = StreamParser()
    with pytest.raises(LocalProtocolError, match="before the end"):
        parser.remainder()
    parser.feed(HEAD + START + PHASE + encode_section_end(2) + PHASE + encode_footer(2) + b"abc")
    while parser.next_event() is not None:
        pass
    assert parser.remainder() == b"abc"
    assert parser.remainder() == b""
    parser.feed(b"def")
    parser.feed(memoryview(b"ghi"))
    assert parser.next_event() is None
    assert parser.remainder() == b"defghi"


def test_a_refused_stream_stays_refused():
    parser = StreamParser()
    parser.feed(b"\x7fELF")
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=r"begins with 0x7f454c46"):
            parser.next_event()
        parser.feed(HEAD)


def header(idstr, instance=0, version=4, kind=1):
    name = idstr if isinstance(idstr, bytes) else idstr.encode()
    return struct.pack(">BIB", kind, 2, len(name)) + name + struct.pack(">II", instance, version)


def block(name, length):
    name = name if isinstance(name, bytes) else name.encode()
    return bytes([len(name)]) + name + struct.pack(">Q", length)


def ram(total, *blocks):
    return HEAD + header("ram") + struct.pack(">Q", total | 4) + b"".join(blocks)


def subsection(name, fields=b"", version=1):
    return HEAD + b"\x05" + bytes([len(name)]) + name.encode() + struct.pack(">I", version) + fields


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"QEVM\0\0\0\2", "version is 2, which is obsolete"),
        (b"QEVM\0\0\0\4", "version is 4, allowed is 3"),
        (b"QEVM\0\0\0\3\x07\0\0\0\0", "machine type has 0 bytes"),
        (b"QEVM\0\0\0\3\x07\0\0\x10\x01", "machine type has 4097 bytes, allowed are 1 to 4096"),
        (b"QEVM\0\0\0\3\x07\xff\xff\xff\xff", "machine type has 4294967295 bytes"),
        (b"QEVM\0\0\0\3\x07\0\0\0\1\xff", "machine type .* is not UTF-8"),
        (b"QEVM\0\0\0\3\x07\0\0\0\1\x1b", "machine type .* cannot be printed"),
        (subsection("configuration/other"), "'configuration/other' is unknown"),
        (subsection("configuration/uuid", version=2), "uuid has version 2, allowed is 1"),
        (subsection("configuration/target-page-bits", b"\0\0\0\x40"), "page bits are 64"),
        (
            subsection("configuration/capabilities", b"\xff\xff\xff\xff" + b"\x01a" * 2049),
            "capabilities have 4098 bytes or more, allowed are 4096",
        ),
        (subsection("configuration/capabilities", b"\0\0\0\1\0"), "capability is empty"),
        (
            subsection("configuration/uuid", bytes(16))
            + subsection("configuration/uuid")[23:]
            + bytes(16),
            "MachineUuid comes twice",
        ),
        (HEAD + b"\x00", "ends before the end of the RAM section"),
        (HEAD + b"\x06", "byte 0x06 where a section"),
        (HEAD + b"\x05\x00", "subsection name is empty"),
        (HEAD + b"\x09", "byte 0x09 where"),
        (HEAD + b"\x7e", "byte 0x7e where"),
        (HEAD + header("ram", instance=1), "instance 1, allowed is 0"),
        (HEAD + header("ram", version=3), "version 3, allowed is 4"),
        (HEAD + header("ram", kind=4), "section 'ram' comes before"),
        (HEAD + header("dirty-bitmap", version=1), "section 'dirty-bitmap' comes before"),
        (HEAD + header("timer", kind=4, version=2), "section 'timer' comes before"),
        (HEAD + header(""), "section name is empty"),
        (HEAD + header(b"\xff"), "section name .* is not UTF-8"),
        (HEAD + header("ram") + struct.pack(">Q", 0x1008), "RAM section begins with 0x1008"),
        (HEAD + header("ram") + struct.pack(">Q", 0x1014), "RAM section begins with 0x1014"),
        (HEAD + header("ram") + struct.pack(">Q", 4), "RAM section begins with 0x4"),
        (HEAD + header("ram") + struct.pack(">Q", 0), "RAM section begins with 0x0"),
        (ram(2**62 + 4096), "allowed are MEM_SIZE"),
        (ram(0x2000, block("a", 0)), "'a' has 0 bytes"),
        (ram(0x2000, block("a", 1)), "'a' has 1 bytes, allowed are multiples of 4096"),
        (ram(0x2000, block("a", 0x3000)), "'a' has 12288 bytes, .* up to 8192"),
        (ram(0x2000, block("a", 0x1000), block("b", 0x2000)), "'b' has 8192 bytes, .* up to 4096"),
        (ram(0x2000, block("a", 2**64 - 4096)), "'a' has 18446744073709547520 bytes"),
        (ram(0x2000, block("a", 0x1000), block("a", 0x1000)), "'a' is listed twice"),
        (ram(0x2000, block("", 0x1000)), "name of RAM block 0 is empty"),
        (ram(0x2000, block(b"\xff", 0x1000)), "name of RAM block 0 .* is not UTF-8"),
        (ram(0x2000, block("a\x1b", 0x1000)), "cannot be printed"),
        (HEAD + encode_section_part(2), "PART of section 2 before its START"),
        (HEAD + encode_section_end(2), "END of section 2 before its START"),
        (HEAD + START + PHASE + encode_section_part(3), "PART of section 3, RAM is section 2"),
        (HEAD + START + PHASE + encode_section_end(0), "END of section 0, RAM is section 2"),
        (HEAD + START + PHASE + START, "RAM section starts twice"),
        (HEAD + START + PHASE + encode_footer(3), "footer names section 3, RAM is section 2"),
        (HEAD + START + PHASE + b"\x00", "ends before the end of the RAM section"),
    ],
)
def test_refusals(data, match):
    refused(data, match)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        (0x02, "ZERO"),
        (0x22, "ZERO|CONTINUE"),
        (0x08, "PAGE"),
        (0x5028, "PAGE|CONTINUE"),
        (0x40, "XBZRLE"),
        (0x100, "COMPRESS_PAGE"),
    ],
)
def test_pages_in_the_stream(word, names):
    error = refused(HEAD + START + struct.pack(">Q", word), "pages came in the stream")
    assert f"({names})" in error.message.replace(f"RAM word {word:#x}, ", "")
    assert "postcopy-ram" in error.remedy


@pytest.mark.parametrize("word", [0, 1, 4, 0x90, 0x1080, 0x1010, 0x200, 0x800, 2**63 | 0x80])
def test_other_words(word):
    refused(HEAD + START + PHASE + encode_section_part(2) + struct.pack(">Q", word), "has word")


def command(number, data=b"", size=None):
    return HEAD + struct.pack(">BHH", 8, number, len(data) if size is None else size) + data


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (command(0), "command 0, which is unknown"),
        (command(12), "command 12, which is unknown"),
        (command(65535), "command 65535, which is unknown"),
        (command(4), "POSTCOPY_LISTEN before the end of the RAM section"),
        (command(7, bytes(4)), "PACKAGED before the end"),
        (command(8), "ENABLE_COLO before the end"),
        (command(1, b"x"), "OPEN_RETURN_PATH has 1 bytes, allowed are 0"),
        (command(2), "PING has 0 bytes, allowed are 4"),
        (command(3, bytes(8)), "POSTCOPY_ADVISE has 8 bytes, allowed are 0 or 16"),
        (command(2, size=65535), "PING has 65535 bytes"),
        (command(3, struct.pack(">QQ", 0x201000, 0x1000)), "page sizes 0x201000 and 0x1000"),
        (command(3, struct.pack(">QQ", 0x1000, 0x2000)), "page sizes 0x1000 and 0x2000"),
    ],
)
def test_commands_that_are_refused(data, match):
    refused(data, match)


def test_other_page_sizes_name_the_remedy():
    error = refused(command(3, struct.pack(">QQ", 0x200000, 0x1000)), "page sizes")
    assert error.remedy == "switch the capability postcopy-ram off at the source"


def test_guest_addresses_only_with_ignore_shared():
    blocks = [StreamBlock("pc.ram", 4096, guest_address=0xFFFC0000)]
    data = encode_head("m", [IGNORE_SHARED]) + encode_ram_start(1, blocks) + encode_hook()
    events, _state = parse(data)
    assert events[1].blocks == tuple(blocks)
    refused(encode_head("m") + encode_ram_start(1, blocks) + encode_hook(), "has word 0xfffc0000")


def test_the_longest_names():
    machine = "m" * 4096
    # 16 bytes each with their length bytes: 4096 in all.
    names = Capabilities(tuple(f"capability{at:05}" for at in range(256)))
    head = encode_head(machine, [names])
    start = encode_ram_start(2**32 - 1, [StreamBlock("n" * 255, 4096)])
    events, _state = parse(head + start)
    assert events[0] == StreamHead(head, machine, (names,))
    assert events[1].blocks[0].idstr == "n" * 255
    with pytest.raises(LocalProtocolError, match="capabilities have 4098 bytes"):
        encode_head(machine, [Capabilities((*names.names, "x"))])


def test_the_most_ram():
    """No processor has physical addresses of more than 56 bits."""
    events, _state = parse(HEAD + encode_ram_start(1, [StreamBlock("a", 2**56)]))
    assert events[1].total == 2**56
    with pytest.raises(RemoteProtocolError, match=r"and 4096 to 2\^56 bytes in all"):
        parse(ram(2**56 + 4096, block("a", 2**56 + 4096)))


def test_the_most_blocks():
    blocks = [StreamBlock(f"block{index}", 4096) for index in range(16383)]
    data = HEAD + encode_ram_start(1, blocks)
    assert len(parse(data + encode_hook())[0][1].blocks) == 16383
    more = ram(16384 * 4096, *[block(f"block{index}", 4096) for index in range(16384)])
    with pytest.raises(RemoteProtocolError, match="more than 16383 blocks"):
        parse(more)


@pytest.mark.parametrize(
    "encode",
    [
        lambda: encode_head(""),
        lambda: encode_head("a\n"),
        lambda: encode_head("a" * 4097),
        lambda: encode_head(None, [IGNORE_SHARED]),
        lambda: encode_head("a", [IGNORE_SHARED, IGNORE_SHARED]),
        lambda: encode_head("a", [TargetPageBits(9)]),
        lambda: encode_head("a", [MachineUuid(b"short")]),
        lambda: encode_head("a", [Capabilities(("x" * 256,))]),
        lambda: encode_head("a", [Capabilities(("",))]),
        lambda: encode_head("a", [Capabilities(("x" * 255,) * 17)]),
        lambda: encode_command(12),
        lambda: encode_command(2, bytes(65536)),
        lambda: encode_ram_start(1, []),
        lambda: encode_ram_start(1, [StreamBlock(str(at), 4096) for at in range(16384)]),
        lambda: encode_ram_start(-1, BLOCKS),
        lambda: encode_ram_start(2**32, BLOCKS),
        lambda: encode_ram_start(1, [StreamBlock("", 4096)]),
        lambda: encode_ram_start(1, [StreamBlock("ß" * 128, 4096)]),
        lambda: encode_ram_start(1, [StreamBlock("\ud800", 4096)]),
        lambda: encode_ram_start(1, [StreamBlock("a", 4096), StreamBlock("a", 4096)]),
        lambda: encode_ram_start(1, [StreamBlock("a", 0)]),
        lambda: encode_ram_start(1, [StreamBlock("a", 4097)]),
        lambda: encode_ram_start(1, [StreamBlock("a", 2**62), StreamBlock("b", 4096)]),
        lambda: encode_ram_start(1, [StreamBlock("a", 4096, guest_address=1), *BLOCKS]),
        lambda: encode_ram_start(1, [StreamBlock("a", 4096, guest_address=2**64)]),
        lambda: encode_footer(2**32),
        lambda: encode_section_part(-1),
        lambda: encode_section_end(2**32),
    ],
)
def test_bad_values_are_not_encoded(encode):
    with pytest.raises(LocalProtocolError):
        encode()
