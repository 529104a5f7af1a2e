# SPDX-License-Identifier: Apache-2.0
"""Incremental parser of the QEMU migration stream up to the end of the RAM section.

Section bodies carry no length, so only what RAM needs can be read without knowing devices: the
parser reads header, configuration, commands and the RAM section, and hands on what follows as
opaque bytes.

Wire: docs/protocol.md, stream.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

from rdma_mig.errors import LocalProtocolError, RemoteProtocolError
from rdma_mig.wire.fields import decode_text
from rdma_mig.wire.records import MAX_RAM_BLOCKS
from rdma_mig.wire.stream_format import (
    CAPABILITY_IGNORE_SHARED,
    CONFIGURATION_MAX,
    PAGE_SIZE,
    QEMU_VM_COMMAND,
    QEMU_VM_CONFIGURATION,
    QEMU_VM_EOF,
    QEMU_VM_FILE_MAGIC,
    QEMU_VM_FILE_VERSION,
    QEMU_VM_FILE_VERSION_COMPAT,
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_FOOTER,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
    QEMU_VM_SUBSECTION,
    QEMU_VM_VMDESCRIPTION,
    RAM_IDSTR,
    RAM_INSTANCE_ID,
    RAM_SAVE_FLAG_COMPRESS_PAGE,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_EOS,
    RAM_SAVE_FLAG_FULL,
    RAM_SAVE_FLAG_HOOK,
    RAM_SAVE_FLAG_MEM_SIZE,
    RAM_SAVE_FLAG_MULTIFD_FLUSH,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_XBZRLE,
    RAM_SAVE_FLAG_ZERO,
    RAM_TOTAL_MAX,
    RAM_VERSION,
    STR8_MAX,
    Capabilities,
    Command,
    CommandType,
    Event,
    Hook,
    MachineUuid,
    RamEnd,
    RamPart,
    RamStart,
    SectionEnd,
    StreamBlock,
    StreamHead,
    Subsection,
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

__all__ = [
    "CAPABILITY_IGNORE_SHARED",
    "PAGE_SIZE",
    "QEMU_VM_COMMAND",
    "QEMU_VM_CONFIGURATION",
    "QEMU_VM_EOF",
    "QEMU_VM_FILE_MAGIC",
    "QEMU_VM_FILE_VERSION",
    "QEMU_VM_FILE_VERSION_COMPAT",
    "QEMU_VM_SECTION_END",
    "QEMU_VM_SECTION_FOOTER",
    "QEMU_VM_SECTION_FULL",
    "QEMU_VM_SECTION_PART",
    "QEMU_VM_SECTION_START",
    "QEMU_VM_SUBSECTION",
    "QEMU_VM_VMDESCRIPTION",
    "RAM_IDSTR",
    "RAM_INSTANCE_ID",
    "RAM_SAVE_FLAG_COMPRESS_PAGE",
    "RAM_SAVE_FLAG_CONTINUE",
    "RAM_SAVE_FLAG_EOS",
    "RAM_SAVE_FLAG_FULL",
    "RAM_SAVE_FLAG_HOOK",
    "RAM_SAVE_FLAG_MEM_SIZE",
    "RAM_SAVE_FLAG_MULTIFD_FLUSH",
    "RAM_SAVE_FLAG_PAGE",
    "RAM_SAVE_FLAG_XBZRLE",
    "RAM_SAVE_FLAG_ZERO",
    "RAM_TOTAL_MAX",
    "RAM_VERSION",
    "Capabilities",
    "Command",
    "CommandType",
    "Event",
    "Hook",
    "MachineUuid",
    "PageSink",
    "RamEnd",
    "RamPart",
    "RamStart",
    "SectionEnd",
    "StreamBlock",
    "StreamHead",
    "StreamParser",
    "Subsection",
    "TargetPageBits",
    "encode_command",
    "encode_eos",
    "encode_footer",
    "encode_head",
    "encode_hook",
    "encode_ram_start",
    "encode_section_end",
    "encode_section_part",
]

T = TypeVar("T")
# A step of the parser: yields None for "more bytes" and events, returns what it read.
_Step = Generator[Event | None, None, T]
_Kind = Literal["start", "part", "end"]

_PAGE_FLAGS = {
    RAM_SAVE_FLAG_ZERO: "ZERO",
    RAM_SAVE_FLAG_PAGE: "PAGE",
    RAM_SAVE_FLAG_XBZRLE: "XBZRLE",
    RAM_SAVE_FLAG_COMPRESS_PAGE: "COMPRESS_PAGE",
    RAM_SAVE_FLAG_CONTINUE: "CONTINUE",
}
# Data lengths of the commands that a migration without postcopy may carry.
_COMMAND_LENGTHS = {
    CommandType.OPEN_RETURN_PATH: (0,),
    CommandType.PING: (4,),
    CommandType.POSTCOPY_ADVISE: (0, 16),
    CommandType.SWITCHOVER_START: (0,),
}
_POSTCOPY_REMEDY = "switch the capability postcopy-ram off at the source"
_PAGE_WORD = sum(_PAGE_FLAGS)


class PageSink(Protocol):
    """What takes the pages that come in the stream, where they do."""

    def load(self, data: bytes | bytearray | memoryview, at: int) -> int:
        """Take the page records at ``data[at:]``; return where they end.

        That is at an incomplete record, or at a word that is not a page's.

        Raises:
            RemoteProtocolError: a record is wrong; its ``at`` is where it begins in ``data``.
        """
        ...


class StreamParser:
    """Turns the bytes of a migration stream into events.

    ``feed()`` bytes, then take ``next_event()`` until it returns None. Where the bytes were cut
    makes no difference. After a :class:`SectionEnd` of kind "end" everything is device state:
    ``next_event()`` returns None and ``remainder()`` hands over the bytes.

    A :class:`Hook` is an event of its own: the caller serves the registration phase before it asks
    for the next event. Memory: the bytes that were fed and not yet parsed, and one block list.

    Args:
        page_sink: called once, with the :class:`RamStart` that was handed over before, when the
            first page comes in the stream; pages go to what it returns. None refuses pages, as is
            right over RDMA.

    Wire: docs/protocol.md, stream.
    """

    def __init__(self, page_sink: Callable[[RamStart], PageSink] | None = None) -> None:
        self._page_sink = page_sink
        self._pages: PageSink | None = None
        self._start: RamStart | None = None
        self._buffer = bytearray()
        self._at = 0
        self._field_at = 0
        self._dropped = 0
        self._raw: bytearray | None = bytearray()
        self._section_id: int | None = None
        self._guest_addresses = False
        self._error: RemoteProtocolError | None = None
        self._device_state = False
        self._footers = True
        self._awaiting = "the stream header"
        self._steps = self._run()

    @property
    def in_device_state(self) -> bool:
        """Whether the RAM section is over and all further bytes are device state."""
        return self._device_state

    @property
    def footers(self) -> bool:
        """Whether sections end with footers, as the last one did."""
        return self._footers

    @property
    def awaiting(self) -> str:
        """What the parser needs next, for the message of a wait that fails."""
        return self._awaiting

    @property
    def buffered(self) -> int:
        """Bytes that were fed and are neither parsed nor handed over."""
        return len(self._buffer) - self._at

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes of the stream."""
        if self._at:
            del self._buffer[: self._at]
            self._dropped += self._at
            self._field_at -= self._at
            self._at = 0
        self._buffer += data

    def next_event(self) -> Event | None:
        """Return the next event; None when more bytes are needed, or in device state.

        Raises:
            RemoteProtocolError: the stream is broken or holds what cannot be served, and ``at``
                which byte of the stream; raised again by every later call.
        """
        if self._error is not None:
            raise self._error
        if self._device_state:
            return None
        try:
            return next(self._steps)
        except StopIteration:
            return None
        except RemoteProtocolError as error:
            self._locate(error, self._field_at if error.at is None else error.at)
            self._error = error
            raise

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Say in a RemoteProtocolError raised within, where in the stream that is.

        For who finds something wrong with the event that came last: it was found up to there.
        """
        try:
            yield
        except RemoteProtocolError as error:
            if error.at is None:
                self._locate(error, self._field_at)
            raise

    def _locate(self, error: RemoteProtocolError, at: int) -> None:
        error.at = self._dropped + at
        error.message += f" (byte {error.at} of the stream)"

    def remainder(self) -> bytes:
        """Return, and forget, all bytes of device state that were fed so far.

        Raises:
            LocalProtocolError: the RAM section is not over.
        """
        if not self._device_state:
            raise LocalProtocolError("device state was asked for before the end of the RAM section")
        data = bytes(memoryview(self._buffer)[self._at :])
        self._buffer = bytearray()
        self._at = 0
        return data

    # Reading. Each step waits for all bytes of one field, so nothing is parsed twice.

    def _need(self, count: int) -> _Step[None]:
        while len(self._buffer) - self._at < count:
            yield None

    def _take(self, count: int) -> _Step[bytes]:
        yield from self._need(count)
        self._field_at = self._at
        data = bytes(self._buffer[self._at : self._at + count])
        self._at += count
        if self._raw is not None:
            self._raw += data
        return data

    def _peek(self) -> _Step[int]:
        yield from self._need(1)
        return self._buffer[self._at]

    def _uint(self, size: int) -> _Step[int]:
        return int.from_bytes((yield from self._take(size)), "big")

    def _name(self, field: str) -> _Step[str]:
        size = yield from self._uint(1)
        return decode_text(field, (yield from self._take(size)), STR8_MAX)

    # The grammar.

    def _run(self) -> _Step[None]:
        yield from self._head()
        while not self._device_state:
            self._awaiting = "a section or command"
            yield from self._element()

    def _head(self) -> _Step[None]:
        magic = yield from self._uint(4)
        if magic != QEMU_VM_FILE_MAGIC:
            raise RemoteProtocolError(
                f"stream begins with {magic:#010x}, allowed is {QEMU_VM_FILE_MAGIC:#x} (QEVM)",
                remedy="check that it comes from the source of a QEMU migration",
            )
        version = yield from self._uint(4)
        if version == QEMU_VM_FILE_VERSION_COMPAT:
            raise RemoteProtocolError(
                "stream version is 2, which is obsolete, allowed is 3",
                remedy="use a newer QEMU at the source",
            )
        if version != QEMU_VM_FILE_VERSION:
            raise RemoteProtocolError(f"stream version is {version}, allowed is 3")
        machine: str | None = None
        subsections: list[Subsection] = []
        self._awaiting = "the configuration section"
        if (yield from self._peek()) == QEMU_VM_CONFIGURATION:
            yield from self._take(1)
            size = yield from self._uint(4)
            if not 1 <= size <= CONFIGURATION_MAX:
                raise RemoteProtocolError(
                    f"machine type has {size} bytes, allowed are 1 to {CONFIGURATION_MAX}"
                )
            machine = decode_text("machine type", (yield from self._take(size)), CONFIGURATION_MAX)
            while (yield from self._peek()) == QEMU_VM_SUBSECTION:
                yield from self._take(1)
                section = yield from self._subsection()
                if type(section) in map(type, subsections):
                    raise RemoteProtocolError(
                        f"configuration subsection {type(section).__name__} comes twice"
                    )
                subsections.append(section)
        raw = bytes(self._raw or b"")
        self._raw = None
        yield StreamHead(raw, machine, tuple(subsections))

    def _subsection(self) -> _Step[Subsection]:
        name = yield from self._name("configuration subsection name")
        version = yield from self._uint(4)
        if version != 1:
            raise RemoteProtocolError(f"{name} has version {version}, allowed is 1")
        match name:
            case "configuration/target-page-bits":
                bits = yield from self._uint(4)
                if not 10 <= bits <= 30:
                    raise RemoteProtocolError(f"target page bits are {bits}, allowed are 10 to 30")
                return TargetPageBits(bits)
            case "configuration/capabilities":
                return (yield from self._capabilities())
            case "configuration/uuid":
                return MachineUuid((yield from self._take(16)))
            case _:
                raise RemoteProtocolError(
                    f"configuration subsection {name!r} is unknown",
                    remedy="switch off at the source what adds it, or report it",
                )

    def _capabilities(self) -> _Step[Capabilities]:
        count = yield from self._uint(4)
        names: list[str] = []
        size = 0
        for _ in range(count):
            name = yield from self._name("capability")
            names.append(name)
            size += 1 + len(name.encode())
            if size > CONFIGURATION_MAX:
                raise RemoteProtocolError(
                    f"capabilities have {size} bytes or more, allowed are {CONFIGURATION_MAX}"
                )
        self._guest_addresses = CAPABILITY_IGNORE_SHARED in names
        return Capabilities(tuple(names))

    def _element(self) -> _Step[None]:
        kind = yield from self._uint(1)
        if kind == QEMU_VM_COMMAND:
            yield from self._command()
        elif kind in (QEMU_VM_SECTION_START, QEMU_VM_SECTION_FULL):
            yield from self._section_start(kind)
        elif kind in (QEMU_VM_SECTION_PART, QEMU_VM_SECTION_END):
            yield from self._section_continued(kind)
        elif kind == QEMU_VM_EOF:
            raise RemoteProtocolError("stream ends before the end of the RAM section")
        else:
            raise RemoteProtocolError(
                f"stream has byte {kind:#04x} where a section or command begins"
            )

    def _command(self) -> _Step[None]:
        number = yield from self._uint(2)
        size = yield from self._uint(2)
        try:
            command = CommandType(number)
        except ValueError:
            raise RemoteProtocolError(f"stream has command {number}, which is unknown") from None
        lengths = _COMMAND_LENGTHS.get(command)
        if lengths is None:
            raise RemoteProtocolError(
                f"stream has command {command.name} before the end of the RAM section",
                remedy="switch postcopy-ram and x-colo off at the source",
            )
        if size not in lengths:
            allowed = " or ".join(str(length) for length in lengths)
            raise RemoteProtocolError(
                f"command {command.name} has {size} bytes, allowed are {allowed}"
            )
        data = yield from self._take(size)
        if command is CommandType.POSTCOPY_ADVISE and data:
            # With several page sizes the block list would have fields that nothing announces.
            sizes, target = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
            if (sizes, target) != (PAGE_SIZE, PAGE_SIZE):
                raise RemoteProtocolError(
                    f"POSTCOPY_ADVISE has page sizes {sizes:#x} and {target:#x}, "
                    f"allowed is {PAGE_SIZE:#x}",
                    remedy=_POSTCOPY_REMEDY,
                )
        yield Command(command, data)

    def _section_start(self, kind: int) -> _Step[None]:
        section_id = yield from self._uint(4)
        idstr = yield from self._name("section name")
        instance_id = yield from self._uint(4)
        version = yield from self._uint(4)
        if idstr != RAM_IDSTR or kind != QEMU_VM_SECTION_START:
            raise RemoteProtocolError(
                f"section {idstr!r} comes before the end of the RAM section and cannot be skipped",
                remedy="take the device or capability that sends it away from the source",
            )
        if self._section_id is not None:
            raise RemoteProtocolError("the RAM section starts twice")
        if instance_id != RAM_INSTANCE_ID:
            raise RemoteProtocolError(f"RAM section has instance {instance_id}, allowed is 0")
        if version != RAM_VERSION:
            raise RemoteProtocolError(
                f"RAM section has version {version}, allowed is {RAM_VERSION}",
                remedy="use another QEMU at the source",
            )
        self._awaiting = "the RAM block list"
        total, blocks = yield from self._blocks()
        self._section_id = section_id
        self._start = RamStart(section_id, instance_id, version, total, blocks)
        yield self._start
        yield from self._body("start")

    def _blocks(self) -> _Step[tuple[int, tuple[StreamBlock, ...]]]:
        word = yield from self._uint(8)
        total = word - RAM_SAVE_FLAG_MEM_SIZE
        if word % PAGE_SIZE != RAM_SAVE_FLAG_MEM_SIZE or not 0 < total <= RAM_TOTAL_MAX:
            raise RemoteProtocolError(
                f"RAM section begins with {word:#x}, allowed are MEM_SIZE (4) and 4096 to 2^56 "
                "bytes in all"
            )
        blocks: list[StreamBlock] = []
        names: set[str] = set()
        left = total
        while left:
            index = len(blocks)
            if index == MAX_RAM_BLOCKS:
                raise RemoteProtocolError(f"RAM has more than {MAX_RAM_BLOCKS} blocks")
            name = yield from self._name(f"name of RAM block {index}")
            if name in names:
                raise RemoteProtocolError(f"RAM block {name!r} is listed twice")
            names.add(name)
            length = yield from self._uint(8)
            if not 0 < length <= left or length % PAGE_SIZE:
                raise RemoteProtocolError(
                    f"RAM block {name!r} has {length} bytes, allowed are multiples of {PAGE_SIZE} "
                    f"up to {left}, what is left of the total"
                )
            address = (yield from self._uint(8)) if self._guest_addresses else None
            blocks.append(StreamBlock(name, length, guest_address=address))
            left -= length
        return total, tuple(blocks)

    def _section_continued(self, kind: int) -> _Step[None]:
        section_id = yield from self._uint(4)
        word = "PART" if kind == QEMU_VM_SECTION_PART else "END"
        if self._section_id is None:
            raise RemoteProtocolError(f"stream has {word} of section {section_id} before its START")
        if section_id != self._section_id:
            raise RemoteProtocolError(
                f"stream has {word} of section {section_id}, RAM is section {self._section_id}"
            )
        if kind == QEMU_VM_SECTION_PART:
            yield RamPart(section_id)
            yield from self._body("part")
        else:
            yield RamEnd(section_id)
            yield from self._body("end")

    def _body(self, kind: _Kind) -> _Step[None]:
        while True:
            self._awaiting = "the HOOK or EOS of the RAM section"
            if self._page_sink is not None:
                self._awaiting = "pages, or the EOS of the RAM section"
                yield from self._load_pages()
            word = yield from self._uint(8)
            if word == RAM_SAVE_FLAG_HOOK:
                yield Hook()
            elif word == RAM_SAVE_FLAG_EOS:
                break
            else:
                raise _bad_word(word, pages=self._page_sink is not None)
        self._awaiting = "the byte behind the RAM section"
        has_footer = (yield from self._peek()) == QEMU_VM_SECTION_FOOTER
        if has_footer:
            yield from self._take(1)
            section_id = yield from self._uint(4)
            if section_id != self._section_id:
                raise RemoteProtocolError(
                    f"footer names section {section_id}, RAM is section {self._section_id}"
                )
        self._footers = has_footer
        if kind == "end":
            self._awaiting = "the device state"
            self._device_state = True
        yield SectionEnd(kind, has_footer)

    def _load_pages(self) -> _Step[None]:
        """Hand pages to the sink, up to a word that is none."""
        while True:
            yield from self._need(8)
            if not int.from_bytes(self._buffer[self._at : self._at + 8], "big") & _PAGE_WORD:
                return
            if self._pages is None:
                assert self._page_sink is not None
                assert self._start is not None
                self._pages = self._page_sink(self._start)
            before = self._at
            self._at = self._pages.load(self._buffer, before)
            if self._at == before:
                yield from self._need(self.buffered + 1)


def _bad_word(word: int, *, pages: bool) -> RemoteProtocolError:
    flags = word % PAGE_SIZE
    names = [name for flag, name in _PAGE_FLAGS.items() if flags & flag]
    if names:
        return RemoteProtocolError(
            f"pages came in the stream (RAM word {word:#x}, {'|'.join(names)}), "
            "over RDMA they are written directly",
            remedy="switch postcopy-ram, xbzrle and compress off at the source",
        )
    remedy = "switch multifd off at the source" if flags & RAM_SAVE_FLAG_MULTIFD_FLUSH else ""
    allowed = "pages, HOOK (0x80) and EOS (0x10)" if pages else "HOOK (0x80) and EOS (0x10)"
    return RemoteProtocolError(
        f"RAM section has word {word:#x}, allowed are {allowed}", remedy=remedy
    )
