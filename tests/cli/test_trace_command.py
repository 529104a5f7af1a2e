# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate trace``: real traces keep the rules, and each rule is missed where it is broken.

The traces in `traces` were written over soft-RoCE: between two rdma-migrate (``ours-*``), by
incoming from a QEMU 7.2 and by outgoing to one (``qemu-*``).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.output import check_output
from trace_kit import TRACES, Records, check, find, load, store

from rdma_mig.cli.main import main

OURS = ("pin-all", "dynamic", "return-path")
QEMU = ("pin-all", "dynamic", "return-path")


# ---- what is real keeps the rules ----


@pytest.mark.parametrize("end", ["in", "out"])
@pytest.mark.parametrize("name", [*(f"ours-{m}" for m in OURS), *(f"qemu-{m}" for m in QEMU)])
def test_real_traces_keep_the_rules(name: str, end: str, capsys: pytest.CaptureFixture[str]):
    assert check(TRACES / f"{name}.{end}") == 0
    role = {"in": "incoming", "out": "outgoing"}[end]
    out = capsys.readouterr().out
    assert re.search(rf"\d+ records, {role}, \d+ RAM phases, completed: keeps all rules", out)


def test_what_was_found_as_json(capsys: pytest.CaptureFixture[str]):
    ends = [str(TRACES / f"ours-dynamic.{end}") for end in ("in", "out")]
    assert main(["trace", "check", "--json", *ends]) == 0
    told = check_output("trace-check", json.loads(capsys.readouterr().out))
    assert [(each["path"], each["role"]) for each in told["traces"]] == [
        (ends[0], "incoming"),
        (ends[1], "outgoing"),
    ]
    assert all(each["status"] == "completed" for each in told["traces"])


@pytest.mark.parametrize("mode", OURS)
@pytest.mark.parametrize("swapped", [False, True])
def test_both_ends_tell_the_same(mode: str, swapped: bool, capsys: pytest.CaptureFixture[str]):
    ends = [TRACES / f"ours-{mode}.in", TRACES / f"ours-{mode}.out"]
    assert check(*(reversed(ends) if swapped else ends)) == 0
    assert capsys.readouterr().out.endswith("both ends tell the same\n")


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
    from rdma_mig.trace.grammar import Side
    from rdma_mig.trace.rows import Row, fold, shortened

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
