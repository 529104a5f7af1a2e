# SPDX-License-Identifier: Apache-2.0
"""What fuzzing starts from, and what it has found.

Seeds are valid inputs, made by our encoders; beside them there is what was recorded of a real QEMU
(``tests/wire/vectors``). ``corpus/TARGET.hex`` has an input a line, in
hexadecimal: the smallest set that a run of the fuzzer found to reach all that it reached, and every
input that ever failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from rdma_mig.memory.blocks import RamBlock
from rdma_mig.snapshot.manifest import BlockRecord, FileRecord, Manifest
from rdma_mig.wire.control import (
    ControlMessage,
    ControlType,
    FinalAck,
    RamBlockRecord,
    RegisterRecord,
    RegisterResult,
    ZeroRun,
    encode_ram_blocks,
)
from rdma_mig.wire.handshake import Extension, PrivateData
from rdma_mig.wire.return_path import Pong, Shut, SwitchoverAck
from rdma_mig.wire.stream import (
    Capabilities,
    CommandType,
    MachineUuid,
    StreamBlock,
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

__all__ = ["keep", "kept", "recorded", "seeds"]

_FOLDER = Path(__file__).with_name("corpus")
# Inputs that say the same at a greater length are no gain in a repository.
_LONGEST = 4096


def kept(target: str) -> list[bytes]:
    """The inputs that are kept for a target."""
    path = _FOLDER / f"{target}.hex"
    return (
        [bytes.fromhex(line) for line in path.read_text("ascii").split()] if path.exists() else []
    )


def keep(target: str, inputs: Iterable[bytes]) -> int:
    """Keep these too, as far as they are short; return how many there are now."""
    short = {data for data in inputs if 0 < len(data) <= _LONGEST}
    lines = sorted({*kept(target), *short}, key=lambda data: (len(data), data))
    (_FOLDER / f"{target}.hex").write_text("".join(f"{line.hex()}\n" for line in lines), "ascii")
    return len(lines)


def seeds(target: str) -> list[bytes]:
    """Valid inputs of a target."""
    return _SEEDS.get(target, list)()


def recorded(target: str) -> list[bytes]:
    """What a real QEMU has sent of this kind; of control messages one of each type and length."""
    sys.path.insert(0, str(_FOLDER.parents[1] / "wire"))
    import test_wire_vectors as wire

    messages = [message for name in wire.VECTORS for message in wire.messages(name, "qemu")]
    match target:
        case "handshake":
            return [bytes.fromhex(x) for v in wire.VECTORS.values() for x in v["private_data"]]
        case "control":
            kinds = {(message["type"], message["length"]): message for message in messages}
            return [wire.bytes_of(message, wire.payload_of(message)) for message in kinds.values()]
        case "stream":
            names = ("src-pin", "src-dyn", "src-postcopy-answered", "src-error")
            return [b"".join(wire.stream_of(name)) for name in names]
        case "return_path":
            return [
                wire.payload_of(message)
                for message in wire.messages("dst-returnpath-ready", "qemu", "QEMU_FILE")
                if message["qp"] == 1
            ]
    return []


def _handshake() -> list[bytes]:
    return [
        PrivateData(1, 0).encode(),
        PrivateData(1, 1).encode() + bytes(48),
        PrivateData(1, 1, Extension(1, 2**63)).encode(),
    ]


def _records() -> list[bytes]:
    return [
        RamBlockRecord(0x7F0000000000, 0, 0x2000000, 7).encode(),
        RegisterRecord(0, 0x100000, 1).encode(),
        RegisterResult(5, 0x7F0000000000).encode(),
        ZeroRun(0, 0, 4096, 8192).encode(),
        FinalAck(0, "on disk").encode(),
    ]


def _control() -> list[bytes]:
    blocks = [
        RamBlockRecord(0x7F0000000000, 0, 0x2000000, 7),
        RamBlockRecord(0x7F0010000000, 0x2000000, 0x40000, 8),
        RamBlockRecord(0x7F0020000000, 0x4000000, 0x123000, 9),
    ]
    _block, register, result, zero, ack = _records()
    messages = [
        ControlMessage(ControlType.READY),
        ControlMessage(ControlType.ERROR),
        ControlMessage(ControlType.QEMU_FILE, b"QEVM" + bytes(20)),
        ControlMessage(ControlType.RAM_BLOCKS_REQUEST),
        ControlMessage(ControlType.RAM_BLOCKS_RESULT, encode_ram_blocks(blocks)),
        ControlMessage(ControlType.COMPRESS, zero),
        ControlMessage(ControlType.REGISTER_REQUEST, register * 2, 2),
        ControlMessage(ControlType.REGISTER_RESULT, result * 2, 2),
        ControlMessage(ControlType.REGISTER_FINISHED),
        ControlMessage(ControlType.UNREGISTER_REQUEST, register),
        ControlMessage(ControlType.UNREGISTER_FINISHED),
        ControlMessage(ControlType.FINAL_ACK, ack),
    ]
    return [message.encode() for message in messages]


def _stream() -> list[bytes]:
    blocks = [StreamBlock("pc.ram", 0x2000000), StreamBlock("pc.bios", 0x40000)]
    subsections = [TargetPageBits(12), Capabilities(("x-ignore-shared",)), MachineUuid(bytes(16))]
    end = encode_eos() + encode_footer(2)
    commands = (
        encode_command(CommandType.OPEN_RETURN_PATH)
        + encode_command(CommandType.PING, bytes(4))
        + encode_command(CommandType.POSTCOPY_ADVISE, b"\0\0\0\0\0\0\x10\0" * 2)
    )
    shared = [StreamBlock(block.idstr, block.length, guest_address=0) for block in blocks]
    body = end + encode_section_part(2) + encode_hook() + end + encode_section_end(2)
    return [
        encode_head("pc-q35-7.2") + encode_ram_start(2, blocks) + body + encode_hook() + end,
        encode_head("pc-q35-7.2") + commands + encode_ram_start(2, blocks),
        encode_head("pc", subsections) + encode_ram_start(1, shared),
        encode_head(None) + encode_ram_start(2, blocks) + body,
    ]


_DESCRIPTION = json.dumps(
    {
        "page_size": 4096,
        "devices": [
            {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2,
             "fields": [{"name": "ticks", "type": "int64", "size": 8}]},
        ],
    }
).encode()  # fmt: skip


def _device_state() -> list[bytes]:
    announced = b"\6" + len(_DESCRIPTION).to_bytes(4, "big") + _DESCRIPTION
    return [b"state\x7e\0\0\0\3\0" + announced, b"state\x7e\0\0\0\3\0"]


def _return_path() -> list[bytes]:
    return [Pong(1).encode() + Shut(0).encode(), SwitchoverAck().encode(), Shut(1).encode()]


def _address() -> list[bytes]:
    return [b"rdma:192.0.2.1:4444", b"rdma:[fd00::1]:0", b"rdma:host.example:65535", b"rdma:[::]:1"]


def _manifest() -> list[bytes]:
    digest = "0" * 64
    record = FileRecord(12, digest)
    block = BlockRecord(RamBlock("pc.ram", 0x200000), 4096, digest)
    return [Manifest("pc-q35-7.2", 2, True, 12, (block,), record, record, 6, record).encode()]


_SEEDS = {
    "handshake": _handshake,
    "control": _control,
    "records": _records,
    "stream": _stream,
    "device_state": _device_state,
    "description": lambda: [_DESCRIPTION],
    "return_path": _return_path,
    "address": _address,
    "manifest": _manifest,
}
