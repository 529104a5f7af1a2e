# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate trace check``: each rule is missed where a real trace is made to break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from trace_kit import Records, alter, check, find, load, store

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
    return alter(records, find(records, "out", type="QEMU_FILE"), type="HELLO")


@rule("ours-dynamic.out", "there is no channel 'side'")
def unknown_channel(records: Records) -> int:
    return alter(records, find(records, "out"), channel="side")


def end_beside(records: Records, **changed: object) -> int:
    """Put the end of a phase on a connection beside the first right before that of the first."""
    at = find(records, "out", type="REGISTER_FINISHED")
    records.insert(at, records[at] | {"channel": "connection-1"} | changed)
    return at


@rule("ours-dynamic.out", "READY by the source on connection-1")
def message_beside_the_first(records: Records) -> int:
    return end_beside(records, type="READY")


@rule("ours-dynamic.out", "there is no channel 'connection-16'")
def connection_beyond_the_last(records: Records) -> int:
    return end_beside(records, channel="connection-16")


@rule("ours-dynamic.out", "RAM phase 1 ends, and has not ended on connection-1")
def phase_that_does_not_end_beside_the_first(records: Records) -> int:
    end_beside(records)
    return [at for at, record in enumerate(records)
            if record["kind"] == "phase" and record["state"] == "end"][1]  # fmt: skip


@rule("ours-dynamic.out", "the end of RAM phase 1 on connection-1, 0 is due")
def phase_that_ends_twice_beside_the_first(records: Records) -> int:
    return again(records, end_beside(records))


@rule("ours-dynamic.out", "READY with 1 bytes, it has none")
def ready_with_a_payload(records: Records) -> int:
    return alter(records, find(records, "in", type="READY"), length=1)


@rule("ours-dynamic.out", "QEMU_FILE of 0 bytes")
def empty_part_of_the_stream(records: Records) -> int:
    return alter(records, find(records, "out", type="QEMU_FILE"), length=0)


@rule("ours-dynamic.out", "RAM_BLOCKS_RESULT of 33 bytes, its records are of 32")
def odd_result(records: Records) -> int:
    return alter(records, find(records, "in", type="RAM_BLOCKS_RESULT"), length=33)


@rule("ours-dynamic.out", "REGISTER_REQUEST of 24 bytes announces 2 records")
def request_that_announces_more(records: Records) -> int:
    return alter(records, find(records, "out", type="REGISTER_REQUEST"), repeat=2)


@rule("qemu-dynamic.in", "without a READY for it")
def message_without_ready(records: Records) -> int:
    records.pop(find(records, "out", 1, type="READY"))
    return find(records, "in", 1)


@rule("qemu-dynamic.in", "a second READY, the one before it has not been used")
def two_readys(records: Records) -> int:
    return again(records, find(records, "out", type="READY"))


@rule("ours-dynamic.out", "READY by the source on the control channel")
def ready_by_the_source(records: Records) -> int:
    return alter(records, find(records, "in", type="READY"), kind="out")


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
    return alter(
        records, find(records, "out", type="REGISTER_FINISHED"), type="QEMU_FILE", length=5
    )


@rule("ours-dynamic.out", "REGISTER_RESULT in answer to RAM_BLOCKS_REQUEST")
def another_reply(records: Records) -> int:
    return alter(
        records, find(records, "in", type="RAM_BLOCKS_RESULT"), type="REGISTER_RESULT", length=16
    )


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
    return alter(
        records,
        find(records, "out", -1, type="REGISTER_FINISHED"),
        type="REGISTER_REQUEST",
        length=24,
        repeat=1,
    )


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
    return alter(records, find(records, "phase", number=1, state="begin"), number=2)


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
    return alter(records, find(records, "round", 1), number=3)


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
    return alter(records, find(records, "write"), chunk=77, last=77)


@rule("ours-pin-all.out", "a write to chunk 3 of 'RAM block pc.ram', not registered")
def write_beyond_what_a_source_at_rest_has_registered(records: Records) -> int:
    alter(records, find(records, "register"), chunk=0, bytes=3 << 20)
    return find(records, "write")


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
    return alter(records, find(records, "register", block="RAM block pc.ram"), chunk=0)


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
    return alter(records, find(records, "commit"), by="READY")


@rule("ours-dynamic.out", "a commit point of a 'destination' in this trace")
def commit_of_another(records: Records) -> int:
    return alter(records, find(records, "commit"), role="destination")


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
    return alter(
        records,
        find(records, "in", channel="return-path", type="QEMU_FILE"),
        type="COMPRESS",
        length=24,
    )


@rule("ours-dynamic.out", "there is no state 'middle' of a phase")
def phase_in_its_middle(records: Records) -> int:
    return alter(records, find(records, "phase", number=1, state="end"), state="middle")


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
    return alter(records, find(records, "write"), bytes=0)


@rule("ours-dynamic.out", "a write of 1 bytes over 2 chunks")
def write_over_more_than_it_has(records: Records) -> int:
    at = find(records, "write")
    return alter(records, at, last=records[at]["chunk"] + 2, bytes=1)


@rule("ours-dynamic.out", "completed within a RAM phase")
def completed_within_a_phase(records: Records) -> int:
    begin = find(records, "phase", number=1, state="begin")
    del records[begin + 1 : -1]
    return len(records) - 1


@rule("ours-return-path.out", "READY by the destination on the return path")
def ready_from_the_wrong_side(records: Records) -> int:
    return alter(records, find(records, "out", channel="return-path", type="READY"), kind="in")


@rule("ours-dynamic.in", "there is no state 'during' of the commit point")
def during_the_commit_point(records: Records) -> int:
    return alter(records, find(records, "commit"), state="during")


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
