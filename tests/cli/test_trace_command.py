# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate trace``: real traces keep the rules, and each rule is missed where it is broken.

The traces in `traces` were written over soft-RoCE: between two rdma-migrate (``ours-*``), by
incoming from a QEMU 7.2 and by outgoing to one (``qemu-*``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rdma_mig.cli.main import main

TRACES = Path(__file__).with_name("traces")
OURS = ("pin-all", "dynamic", "return-path")
QEMU = ("pin-all", "dynamic", "return-path")
Records = list[dict[str, Any]]


def load(name: str) -> Records:
    return [json.loads(line) for line in (TRACES / name).read_text().splitlines()]


def store(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def find(records: Records, kind: str, nth: int = 0, **fields: Any) -> int:
    """Index of the nth record of a kind with these fields; counted from the end if negative."""
    found = [
        at
        for at, record in enumerate(records)
        if record["kind"] == kind and all(record[name] == value for name, value in fields.items())
    ]
    return found[nth]


def check(*paths: Path | str) -> int:
    return main(["trace", "check", *map(str, paths)])


# ---- what is real keeps the rules ----


@pytest.mark.parametrize("end", ["in", "out"])
@pytest.mark.parametrize("name", [*(f"ours-{m}" for m in OURS), *(f"qemu-{m}" for m in QEMU)])
def test_real_traces_keep_the_rules(name: str, end: str, capsys: pytest.CaptureFixture[str]):
    assert check(TRACES / f"{name}.{end}") == 0
    role = {"in": "incoming", "out": "outgoing"}[end]
    out = capsys.readouterr().out
    assert re.search(rf"\d+ records, {role}, \d+ RAM phases, completed: keeps all rules", out)


@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize("swapped", [False, True])
def test_both_ends_tell_the_same(mode: str, swapped: bool, capsys: pytest.CaptureFixture[str]):
    ends = [TRACES / f"ours-{mode}.in", TRACES / f"ours-{mode}.out"]
    assert check(*(reversed(ends) if swapped else ends)) == 0
    assert capsys.readouterr().out.endswith("both ends tell the same\n")


# ---- each rule, broken in a real trace ----

Mutation = Callable[[Records], int]
RULES: dict[str, tuple[str, Mutation, str]] = {}


def rule(trace: str, line: str) -> Callable[[Mutation], Mutation]:
    """Note a mutation: of which trace, and the line that has to name the record it returns."""

    def note(mutate: Mutation) -> Mutation:
        RULES[mutate.__name__] = (trace, mutate, line)
        return mutate

    return note


def move(records: Records, start: int, to: int) -> int:
    """Put a record somewhere else, with the time of that place."""
    record = records.pop(start)
    records.insert(to, record | {"t": records[max(to - 1, 0)]["t"]})
    return to


def again(records: Records, at: int) -> int:
    records.insert(at + 1, dict(records[at]))
    return at + 1


@rule("ours-dynamic.out", "its time, 0.000000 s, lies before the one before it")
def time_runs_backwards(records: Records) -> int:
    records[9]["t"] = 0.0
    return 9


@rule("ours-dynamic.out", "'round' behind the end of the migration")
def something_behind_the_end(records: Records) -> int:
    records.append(records[-1] | {"kind": "round", "number": 2, "last": False})
    return len(records) - 1


@rule("ours-dynamic.out", "it is the last one, and no 'end'")
def no_end(records: Records) -> int:
    records.pop()
    return len(records) - 1


@rule("ours-dynamic.out", "there is no end 'perhaps'")
def unknown_end(records: Records) -> int:
    records[-1]["status"] = "perhaps"
    return len(records) - 1


@rule("ours-dynamic.out", "a second 'begin'")
def second_begin(records: Records) -> int:
    return again(records, 0)


@rule("ours-dynamic.out", "there is no role 'onlooker'")
def unknown_role(records: Records) -> int:
    records[0]["role"] = "onlooker"
    return 0


@rule("ours-dynamic.out", "the trace is of version 1, which does not say enough")
def earlier_version(records: Records) -> int:
    records[0]["version"] = 1
    return 0


@rule("ours-dynamic.in", "connected without an event of rdma_cm that says so")
def no_connection_request(records: Records) -> int:
    for record in records:
        if record["kind"] == "cm":
            record["event"] = "ADDR_RESOLVED"
    return find(records, "connected")


@rule("ours-dynamic.in", "the migration is connected already")
def connected_twice(records: Records) -> int:
    return again(records, find(records, "connected"))


@rule("ours-dynamic.in", "READY before the connection is up")
def message_before_the_connection(records: Records) -> int:
    records.pop(find(records, "connected"))
    return find(records, "out", type="READY")


@rule("ours-dynamic.out", "QEMU_FILE on a transport without control messages")
def message_where_there_are_none(records: Records) -> int:
    records[find(records, "connected")]["device"] = None
    first = find(records, "in", type="READY")
    records.pop(first)
    return find(records, "out")


@rule("ours-dynamic.out", "there is no control message 'HELLO'")
def unknown_message(records: Records) -> int:
    at = find(records, "out", type="QEMU_FILE")
    records[at]["type"] = "HELLO"
    return at


@rule("ours-dynamic.out", "there is no channel 'side'")
def unknown_channel(records: Records) -> int:
    at = find(records, "out")
    records[at]["channel"] = "side"
    return at


@rule("ours-dynamic.out", "READY with 1 bytes, it has none")
def ready_with_a_payload(records: Records) -> int:
    at = find(records, "in", type="READY")
    records[at]["length"] = 1
    return at


@rule("ours-dynamic.out", "QEMU_FILE of 0 bytes")
def empty_part_of_the_stream(records: Records) -> int:
    at = find(records, "out", type="QEMU_FILE")
    records[at]["length"] = 0
    return at


@rule("ours-dynamic.out", "RAM_BLOCKS_RESULT of 33 bytes, its records are of 32")
def odd_result(records: Records) -> int:
    at = find(records, "in", type="RAM_BLOCKS_RESULT")
    records[at]["length"] = 33
    return at


@rule("ours-dynamic.out", "REGISTER_REQUEST of 24 bytes announces 2 records")
def request_that_announces_more(records: Records) -> int:
    at = find(records, "out", type="REGISTER_REQUEST")
    records[at]["repeat"] = 2
    return at


@rule("qemu-dynamic.in", "without a READY for it")
def message_without_ready(records: Records) -> int:
    records.pop(find(records, "out", 1, type="READY"))
    return find(records, "in", 1)


@rule("qemu-dynamic.in", "a second READY, the one before it has not been used")
def two_readys(records: Records) -> int:
    return again(records, find(records, "out", type="READY"))


@rule("ours-dynamic.out", "READY by the source on the control channel")
def ready_by_the_source(records: Records) -> int:
    at = find(records, "in", type="READY")
    records[at]["kind"] = "out"
    return at


@rule("ours-dynamic.out", "READY before the reply, RAM_BLOCKS_RESULT")
def ready_before_the_reply(records: Records) -> int:
    reply = find(records, "in", type="RAM_BLOCKS_RESULT")
    ready = next(at for at in range(reply, len(records)) if records[at].get("type") == "READY")
    return move(records, ready, reply)


@rule("ours-dynamic.in", "READY behind FINAL_ACK")
def ready_behind_the_acknowledgement(records: Records) -> int:
    at = find(records, "out", type="FINAL_ACK")
    records.insert(at + 1, records[at] | {"type": "READY", "length": 0})
    return at + 1


@rule("ours-dynamic.out", "REGISTER_REQUEST by the source between RAM phases")
def request_outside_of_a_phase(records: Records) -> int:
    begin = find(records, "phase", number=1, state="begin")
    request = find(records, "out", type="REGISTER_REQUEST")
    ready = max(at for at in range(request) if records[at].get("type") == "READY")
    move(records, ready, begin)
    return move(records, request, begin + 1)


@rule("ours-dynamic.out", "QEMU_FILE by the source in a RAM phase")
def stream_in_a_phase(records: Records) -> int:
    at = find(records, "out", type="REGISTER_FINISHED")
    records[at] |= {"type": "QEMU_FILE", "length": 5}
    return at


@rule("ours-dynamic.out", "REGISTER_RESULT in answer to RAM_BLOCKS_REQUEST")
def another_reply(records: Records) -> int:
    at = find(records, "in", type="RAM_BLOCKS_RESULT")
    records[at] |= {"type": "REGISTER_RESULT", "length": 16}
    return at


@rule("ours-dynamic.out", "by the source behind ERROR")
def message_behind_an_error(records: Records) -> int:
    at = find(records, "in", 1, type="READY")
    records[at]["type"] = "ERROR"
    return find(records, "out", 1)


@rule("ours-dynamic.out", "RAM_BLOCKS_REQUEST for the second time")
def blocks_asked_twice(records: Records) -> int:
    request = find(records, "out", type="RAM_BLOCKS_REQUEST")
    reply = find(records, "in", type="RAM_BLOCKS_RESULT")
    ready = next(at for at in range(reply, len(records)) if records[at].get("type") == "READY")
    records.insert(ready + 1, records[request] | {"t": records[ready]["t"]})
    return ready + 1


@rule("ours-dynamic.out", "REGISTER_FINISHED before the RAM blocks are agreed on")
def blocks_never_asked(records: Records) -> int:
    request = find(records, "out", type="RAM_BLOCKS_REQUEST")
    reply = find(records, "in", type="RAM_BLOCKS_RESULT")
    del records[request : reply + 2]
    return find(records, "out", type="REGISTER_FINISHED")


@rule("ours-pin-all.out", "REGISTER_REQUEST although all RAM is pinned")
def request_with_pin_all(records: Records) -> int:
    at = find(records, "out", -1, type="REGISTER_FINISHED")
    records[at] |= {"type": "REGISTER_REQUEST", "length": 24, "repeat": 1}
    return at


@rule("ours-pin-all.in", "3 RAM blocks are announced and 2 are registered")
def block_announced_and_not_registered(records: Records) -> int:
    gone = records.pop(find(records, "register"))
    records.pop(find(records, "deregister", block=gone["block"]))
    return find(records, "out", type="RAM_BLOCKS_RESULT")


@rule("ours-dynamic.out", "a RAM phase begins in a RAM phase")
def phase_within_a_phase(records: Records) -> int:
    return again(records, find(records, "phase", number=1, state="begin"))


@rule("ours-dynamic.out", "RAM phase 2 where 1 is due")
def phase_left_out(records: Records) -> int:
    at = find(records, "phase", number=1, state="begin")
    records[at]["number"] = 2
    return at


@rule("ours-dynamic.out", "RAM phase 1 ends without REGISTER_FINISHED")
def phase_without_its_end(records: Records) -> int:
    at = find(records, "out", -1, type="REGISTER_FINISHED")
    del records[at]
    return find(records, "phase", number=1, state="end")


@rule("ours-dynamic.out", "a RAM phase that no part of the stream has announced")
def phase_without_hook(records: Records) -> int:
    begin = find(records, "phase", number=1, state="begin")
    end = find(records, "phase", number=0, state="end")
    del records[end + 1 : begin]
    return end + 1


@rule("qemu-dynamic.in", "round 3 where 2 is due")
def round_left_out(records: Records) -> int:
    at = find(records, "round", 1)
    records[at]["number"] = 3
    return at


@rule("ours-dynamic.out", "a round behind the last one")
def round_behind_the_last(records: Records) -> int:
    at = find(records, "round", last=True)
    records.insert(at + 1, records[at] | {"number": 2})
    return at + 1


@rule("ours-dynamic.out", "round 1 with 1 RAM phases behind it")
def round_without_its_phase(records: Records) -> int:
    begin = find(records, "phase", number=1, state="begin")
    return move(records, find(records, "round"), begin)


@rule("ours-dynamic.out", "before its key was asked")
def write_before_its_key(records: Records) -> int:
    request = find(records, "out", type="REGISTER_REQUEST")
    return move(records, find(records, "write"), request)


@rule("ours-dynamic.out", "before its key was asked")
def write_to_another_chunk(records: Records) -> int:
    at = find(records, "write")
    records[at] |= {"chunk": 77, "last": 77}
    return at


@rule("ours-pin-all.out", "a write to 'RAM block pc.ram', which is not registered")
def write_to_what_is_not_registered(records: Records) -> int:
    records.pop(find(records, "register", block="RAM block pc.ram"))
    records.pop(find(records, "deregister", block="RAM block pc.ram"))
    return find(records, "write", block="RAM block pc.ram")


@rule("ours-pin-all.out", "a write in setup")
def write_in_setup(records: Records) -> int:
    setup = find(records, "out", type="REGISTER_FINISHED")
    return move(records, find(records, "write"), setup)


@rule("ours-pin-all.out", "a write between RAM phases")
def write_behind_the_phase(records: Records) -> int:
    write, end = find(records, "write"), find(records, "phase", number=1, state="end")
    return move(records, write, end)


@rule("ours-pin-all.in", "a write by the destination")
def write_by_the_destination(records: Records) -> int:
    at = find(records, "phase", number=1, state="begin")
    write = load("ours-pin-all.out")[find(load("ours-pin-all.out"), "write")]
    records.insert(at + 1, write | {"t": records[at]["t"]})
    return at + 1


@rule("qemu-dynamic.in", "is registered without a request")
def registered_unasked(records: Records) -> int:
    request = find(records, "in", type="REGISTER_REQUEST")
    ready = max(at for at in range(request) if records[at].get("type") == "READY")
    return move(records, find(records, "register"), ready)


@rule("ours-pin-all.in", "is registered and RAM_BLOCKS_REQUEST was not seen")
def pinned_unasked(records: Records) -> int:
    begin = find(records, "phase", number=0, state="begin")
    return move(records, find(records, "register"), begin + 1)


@rule("ours-pin-all.in", "'RAM block pc.ram' is registered twice")
def registered_twice(records: Records) -> int:
    return again(records, find(records, "register", block="RAM block pc.ram"))


@rule("ours-pin-all.in", "a chunk of 'RAM block pc.ram' is registered, with pin-all True")
def chunk_with_pin_all(records: Records) -> int:
    at = find(records, "register", block="RAM block pc.ram")
    records[at]["chunk"] = 0
    return at


@rule("ours-pin-all.in", "is registered outside of a RAM phase")
def registered_before_setup(records: Records) -> int:
    begin = find(records, "phase", number=0, state="begin")
    return move(records, find(records, "register"), begin)


@rule("ours-pin-all.in", "is withdrawn and was not registered")
def withdrawn_twice(records: Records) -> int:
    return again(records, find(records, "deregister"))


@rule("ours-pin-all.out", "were not withdrawn before the end")
def key_left(records: Records) -> int:
    records.pop(find(records, "deregister"))
    return len(records) - 1


@rule("qemu-dynamic.in", "the commit point while 'RAM block ")
def key_left_at_the_commit_point(records: Records) -> int:
    records.pop(find(records, "deregister"))
    return find(records, "commit", state="before")


@rule("ours-dynamic.in", "the commit point for the second time")
def committed_twice(records: Records) -> int:
    at = find(records, "commit", state="passed")
    records.insert(at + 1, records[at] | {"state": "before"})
    return at + 1


@rule("ours-dynamic.in", "the commit point is passed by FINAL_ACK without one before it")
def passed_without_before(records: Records) -> int:
    records.pop(find(records, "commit", state="before"))
    return find(records, "commit")


@rule("qemu-dynamic.in", "the commit point is passed and its READY was not sent")
def passed_and_not_said(records: Records) -> int:
    passed = find(records, "commit", state="passed")
    return move(records, passed, find(records, "commit", state="before") + 1)


@rule("ours-dynamic.out", "the commit point before the last RAM phase has ended")
def committed_early(records: Records) -> int:
    at = find(records, "phase", number=1, state="begin")
    return move(records, find(records, "commit", state="before"), at)


@rule("ours-dynamic.out", "the source does not hand over by 'READY'")
def commit_by_another_word(records: Records) -> int:
    at = find(records, "commit")
    records[at]["by"] = "READY"
    return at


@rule("ours-dynamic.out", "a commit point of a 'destination' in this trace")
def commit_of_another(records: Records) -> int:
    at = find(records, "commit")
    records[at]["role"] = "destination"
    return at


@rule("ours-dynamic.out", "completed without having passed the commit point")
def completed_without_commit(records: Records) -> int:
    records.pop(find(records, "commit", state="passed"))
    return len(records) - 1


@rule("ours-dynamic.out", "completed without a last RAM phase")
def completed_without_last_round(records: Records) -> int:
    for state in ("passed", "before"):
        records.pop(find(records, "commit", state=state))
    records[find(records, "round")]["last"] = False
    return len(records) - 1


@rule("ours-return-path.out", "a second READY on the return path")
def two_readys_on_the_return_path(records: Records) -> int:
    return again(records, find(records, "out", channel="return-path", type="READY"))


@rule("ours-return-path.out", "QEMU_FILE on the return path without a READY for it")
def word_without_ready_on_the_return_path(records: Records) -> int:
    records.pop(find(records, "out", 1, channel="return-path", type="READY"))
    return find(records, "in", 1, channel="return-path", type="QEMU_FILE")


@rule("ours-return-path.out", "COMPRESS by the destination on the return path")
def another_word_on_the_return_path(records: Records) -> int:
    at = find(records, "in", channel="return-path", type="QEMU_FILE")
    records[at] |= {"type": "COMPRESS", "length": 24}
    return at


@rule("ours-dynamic.out", "there is no state 'middle' of a phase")
def phase_in_its_middle(records: Records) -> int:
    at = find(records, "phase", number=1, state="end")
    records[at]["state"] = "middle"
    return at


@rule("ours-dynamic.out", "a RAM phase behind the last one")
def phase_behind_the_last(records: Records) -> int:
    at = find(records, "out", -1, type="QEMU_FILE")
    begin = records[find(records, "phase", number=1, state="begin")]
    records.insert(at + 1, begin | {"number": 2, "t": records[at]["t"]})
    return at + 1


@rule("qemu-dynamic.in", "RAM phase 1 in round 0")
def phase_without_its_round(records: Records) -> int:
    records.pop(find(records, "round"))
    return find(records, "phase", number=1, state="begin")


@rule("ours-dynamic.out", "a round within a RAM phase")
def round_within_a_phase(records: Records) -> int:
    begin = find(records, "phase", number=1, state="begin")
    return move(records, find(records, "round"), begin + 1)


@rule("ours-dynamic.out", "a write of nothing")
def write_of_nothing(records: Records) -> int:
    at = find(records, "write")
    records[at]["bytes"] = 0
    return at


@rule("ours-dynamic.out", "a write of 1 bytes over 2 chunks")
def write_over_more_than_it_has(records: Records) -> int:
    at = find(records, "write")
    records[at] |= {"last": records[at]["chunk"] + 2, "bytes": 1}
    return at


@rule("ours-dynamic.out", "completed within a RAM phase")
def completed_within_a_phase(records: Records) -> int:
    begin = find(records, "phase", number=1, state="begin")
    del records[begin + 1 : -1]
    return len(records) - 1


@rule("ours-return-path.out", "READY by the destination on the return path")
def ready_from_the_wrong_side(records: Records) -> int:
    at = find(records, "out", channel="return-path", type="READY")
    records[at]["kind"] = "in"
    return at


@rule("ours-dynamic.in", "there is no state 'during' of the commit point")
def during_the_commit_point(records: Records) -> int:
    at = find(records, "commit")
    records[at]["state"] = "during"
    return at


@pytest.mark.parametrize("name", RULES)
def test_first_violation_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace, mutate, line = RULES[name]
    records = load(trace)
    number = mutate(records) + 1
    assert check(store(tmp_path / "trace", records)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"rdma-migrate: {tmp_path / 'trace'}: record {number}: "), error
    assert line in error
    assert error.count("\n") == 1


# ---- both ends ----


def drop_a_message(records: Records) -> str:
    """Both halves of an exchange go, so that this end alone still keeps the rules."""
    at = find(records, "in", -2, type="QEMU_FILE")
    ready = max(i for i in range(at) if records[i].get("type") == "READY")
    del records[at], records[ready]
    return r"bytes on control, where .* has QEMU_FILE of"


def lengthen_a_message(records: Records) -> str:
    records[find(records, "in", type="QEMU_FILE")]["length"] += 1
    return r"QEMU_FILE of \d+ bytes on control, where .* has QEMU_FILE of \d+ bytes as record \d+"


def another_mode(records: Records) -> str:
    # All that only one mode has goes, so that what is left is right in the other one.
    records[find(records, "connected")]["pin_all"] = True
    registration = ("REGISTER_REQUEST", "REGISTER_RESULT", "COMPRESS")
    kept: Records = []
    for record in records:
        if record["kind"] in ("register", "deregister"):
            continue
        if record.get("type") in registration:
            if record["kind"] == "in":
                # The READY for it.
                del kept[max(i for i in range(len(kept)) if kept[i].get("type") == "READY")]
            continue
        kept.append(record)
    at = find(kept, "out", type="RAM_BLOCKS_RESULT")
    one = {"t": kept[at]["t"], "chunk": None, "bytes": 4096}
    names = [one | {"block": f"RAM block {name}"} for name in "abc"]
    kept[at:at] = [name | {"kind": "register", "seconds": 0} for name in names]
    at = find(kept, "phase", -1, state="end") + 1
    kept[at:at] = [name | {"kind": "deregister", "t": kept[at - 1]["t"]} for name in names]
    records[:] = kept
    return "the ends differ about pin-all"


def lacks_a_chunk(records: Records) -> str:
    at = find(records, "register")
    for kind in ("register", "deregister"):
        for record in records:
            if record["kind"] == kind and record["chunk"] == records[at]["chunk"]:
                record["block"] = record["block"] + "'"
    return "has not registered"


def message_more(records: Records) -> str:
    at = find(records, "in", -1, type="QEMU_FILE")
    ready = max(i for i in range(at) if records[i].get("type") == "READY")
    t = {"t": records[at]["t"]}
    records[at + 1 : at + 1] = [records[ready] | t, records[at] | t]
    return "on control, of which .* knows nothing"


@pytest.mark.parametrize(
    "mutate", [drop_a_message, lengthen_a_message, another_mode, lacks_a_chunk, message_more]
)
def test_difference_between_the_ends_is_named(
    mutate: Callable[[Records], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = load("ours-dynamic.in")
    expected = mutate(records)
    changed = store(tmp_path / "in", records)
    assert check(changed) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert check(changed, TRACES / "ours-dynamic.out") == 1
    assert re.search(rf": record \d+: .*{expected}", capsys.readouterr().err)


def test_two_traces_of_one_role(capsys: pytest.CaptureFixture[str]):
    trace = TRACES / "ours-dynamic.out"
    assert check(trace, trace) == 2
    assert "both traces of outgoing" in capsys.readouterr().err


# ---- what is no trace, or not whole ----

BEGIN = b'{"t":0,"kind":"begin","version":2,"role":"incoming","clock":1.0}\n'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is empty"),
        (b"\n", "record 1 is none"),
        (b"\x7fELF" + bytes(1 << 16), "record 1 is longer than any record is"),
        (b"{}\n", "record 1 is none: a trace record has no time"),
        (b'{"t":0,"kind":"end","status":"failed","message":""}\n', "is no trace of rdma-migrate"),
        (BEGIN[:-1], "record 1 is cut off"),
        (BEGIN + BEGIN[:20], "record 2 is cut off"),
        (BEGIN + b"[" * 20000 + b"\n", "record 2 is none"),
        (BEGIN + b'{"t":1e999,"kind":"x"}\n', "record 2 is none"),
        (BEGIN + b'{"t":1,"kind":"cm","event":["x"],"status":0,"peer":""}\n', "event ['x']"),
        (BEGIN + b'{"t":1,"kind":"cm","event":"x","status":true,"peer":""}\n', "status True"),
        (BEGIN + b'{"t":1,"kind":"round","number":-1,"last":false}\n', "number -1"),
        (BEGIN + b'{"t":1,"kind":"round","number":1,"last":1}\n', "last 1"),
        (BEGIN + b'{"t":1,"kind":"wait","awaited":"x","seconds":NaN}\n', "seconds nan"),
        (BEGIN + b'{"t":1,"kind":"populate","bytes":%d,"seconds":1}\n' % (1 << 70), "bytes 118"),
        (BEGIN + b'{"t":1,"kind":"round","number":' + b"9" * 5000 + b"}\n", "record 2 is none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["show", "check", "chart"])
def test_what_is_no_trace_is_one_line(
    command: str, content: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "trace"
    path.write_bytes(content)
    more = ["-o", str(tmp_path / "out.svg")] if command == "chart" else []
    assert main(["trace", command, str(path), *more]) == 1
    error = capsys.readouterr().err
    assert error.startswith("rdma-migrate: ")
    assert line in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_large_numbers_do_not_take_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records = load("ours-dynamic.out")
    at = find(records, "write")
    records[at] |= {"chunk": 0, "last": 1 << 60, "bytes": 1 << 61, "writes": 1 << 40}
    registered = find(records, "register")
    records[registered]["bytes"] = 1 << 63
    assert check(store(tmp_path / "trace", records)) == 1
    assert "before its key was asked" in capsys.readouterr().err


def test_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert check(tmp_path / "none") == 1
    assert "cannot be read: No such file" in capsys.readouterr().err


# ---- show ----


def test_show_has_a_line_a_record(capsys: pytest.CaptureFixture[str]):
    records = load("ours-dynamic.out")
    assert main(["trace", "show", str(TRACES / "ours-dynamic.out")]) == 0
    _head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        assert float(line.split()[0]) == record["t"]
    text = "\n".join(lines)
    for what in (
        r"destination  <- READY$",
        r"source       -> QEMU_FILE .* bytes$",
        r"source       RAM block pc\.ram, chunk \d+ registered in 0\.\d+ s +1\.0 MiB$",
        r"source       => \d+ writes, RAM block pc\.ram, chunk",
        r"source       RAM phase 1: begin$",
        r"source       commit point: before EOF$",
        r"source       completed$",
    ):
        assert re.search(what, text, re.MULTILINE), what


def test_show_obeys_nothing_that_a_trace_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records = load("ours-dynamic.out")
    records[find(records, "register")]["block"] = "\x1b]0;title\x07\n$x$"
    records.insert(1, {"t": records[0]["t"], "kind": "new\x1b", "more": "\x1b[2J"})
    assert main(["trace", "show", str(store(tmp_path / "trace", records))]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == len(records) + 1


# ---- chart ----


def texts(svg: Path) -> str:
    root = ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return "\n".join(filter(None, (node.text for node in root.iter())))


def test_chart_of_both_ends(tmp_path: Path):
    target = tmp_path / "chart.svg"
    ends = [str(TRACES / f"ours-dynamic.{end}") for end in ("in", "out")]
    assert main(["trace", "chart", *ends, "-o", str(target)]) == 0
    shown = texts(target)
    for what in (
        "source", "destination", "RAM_BLOCKS_REQUEST", "RAM_BLOCKS_RESULT", "REGISTER_REQUEST",
        "RDMA WRITE RAM block pc.ram", "FINAL_ACK", "commit point before EOF", "setup begins",
        "destination: RAM phases", "source: RAM written",
    ):  # fmt: skip
        assert what in shown, what
    assert list(tmp_path.iterdir()) == [target]


def test_chart_of_one_end_is_a_png(tmp_path: Path):
    target = tmp_path / "chart.png"
    assert main(["trace", "chart", str(TRACES / "qemu-dynamic.in"), "-o", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_repetitions_are_told_once():
    from rdma_mig.trace.rows import Row, fold, shortened
    from rdma_mig.trace.rules import Side

    def rows(texts: str) -> list[Row]:
        return [Row(float(at), Side.SOURCE, "", text, 10) for at, text in enumerate(texts)]

    folded = fold(rows("abcbcbcddddde"))
    assert [(row.text, row.count, row.of, row.size) for row in folded] == [
        ("a", 1, 1, 10), ("b", 3, 2, 30), ("c", 3, 2, 30), ("d", 5, 1, 50), ("e", 1, 1, 10),
    ]  # fmt: skip
    short = shortened(rows("abcdefghij"), 5)
    assert [row.text for row in short] == ["a", "b", "... 6 rows are left out ...", "i", "j"]


@pytest.mark.parametrize("block", ["$\\frac{1$", "<b>&\x1b\ud83d"])
def test_chart_draws_whatever_a_block_is_called(block: str, tmp_path: Path):
    records = load("ours-dynamic.out")
    for record in records:
        if "block" in record:
            record["block"] = block
    trace, target = store(tmp_path / "trace", records), tmp_path / "chart.svg"
    assert main(["trace", "chart", str(trace), "-o", str(target)]) == 0
    assert "registers chunk of" in texts(target)


def test_chart_has_a_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = str(TRACES / "ours-dynamic.out")
    assert main(["trace", "chart", trace, "-o", str(tmp_path / "chart.gif")]) == 2
    assert "is no .svg or .png" in capsys.readouterr().err


def test_chart_says_which_library_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    trace = str(TRACES / "ours-dynamic.out")
    assert main(["trace", "chart", trace, "-o", str(tmp_path / "chart.svg")]) == 3
    assert "pip install 'matplotlib>=3.6'" in capsys.readouterr().err
