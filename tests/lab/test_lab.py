# SPDX-License-Identifier: Apache-2.0
"""The parts of the lab and of the closing account that need no machine to be booted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import suite
import summary
from labvm import cli, job
from labvm.host import CACHE, LabError
from labvm.initramfs import Archive
from labvm.kernel import unpacked_image
from labvm.machine import Output, Settings

CASES = {
    "pass": '<testcase classname="c" name="pass" time="1"/>',
    "fail": '<testcase classname="c" name="fail" time="2"><failure message="no"/></testcase>',
    "error": '<testcase classname="c" name="error" time="2"><error message="no"/></testcase>',
    "skip": '<testcase classname="c" name="skip" time="0"><skipped message="why"/></testcase>',
    "xfail": '<testcase classname="c" name="x"><skipped type="pytest.xfail"/></testcase>',
}


def junit(path: Path, *cases: str) -> Path:
    body = "".join(CASES[case] for case in cases)
    path.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    return path


def account(tmp_path: Path, status: int, *cases: str, selected: bool = False) -> tuple[str, int]:
    """Close over a part that went well and one like this."""
    well = summary.read("native", 0, 1.0, junit(tmp_path / "native.xml", "pass"))
    other = summary.read("lab", status, 1.0, junit(tmp_path / "lab.xml", *cases), selected)
    lines, code = summary.report([well, other])
    return "\n".join(lines), code


def test_all_passed(tmp_path):
    text, code = account(tmp_path, 0, "pass", "xfail")
    assert code == 0
    assert text.splitlines()[-1] == "2 passed, 0 failed"


@pytest.mark.parametrize(
    ("status", "cases", "closing"),
    [
        (1, ["pass", "fail"], "2 passed, 1 failed"),
        (1, ["pass", "error"], "2 passed, 1 failed"),
        (0, ["pass", "skip"], "2 passed, 0 failed, 1 skipped"),
        (0, [], "1 passed, 1 failed"),
        (5, [], "1 passed, 1 failed"),
        (0, ["fail"], "1 passed, 2 failed"),
        (1, ["pass"], "2 passed, 1 failed"),
        (2, ["pass"], "2 passed, 1 failed"),
        (124, ["pass"], "2 passed, 1 failed"),
        (125, ["pass"], "2 passed, 1 failed"),
        (137, ["pass"], "2 passed, 1 failed"),
    ],
)
def test_what_is_not_whole_fails(tmp_path, status, cases, closing):
    text, code = account(tmp_path, status, *cases)
    assert code == 1
    assert text.splitlines()[-1] == closing


@pytest.mark.parametrize("content", [None, "", "<testsuites><testsuite>"])
def test_results_that_are_missing_or_cut_fail(tmp_path, content):
    well = summary.read("native", 0, 1.0, junit(tmp_path / "native.xml", "pass"))
    if content is not None:
        (tmp_path / "lab.xml").write_text(content)
    lines, code = summary.report([well, summary.read("lab", 125, 1.0, tmp_path / "lab.xml")])
    assert code == 1
    assert any("no results" in line and "the lab did not start" in line for line in lines)


def test_a_selection_may_miss_a_part_but_not_all(tmp_path):
    assert account(tmp_path, 5, selected=True)[1] == 0
    empty = [
        summary.read(label, 5, 1.0, junit(tmp_path / f"{label}.xml"), may_be_empty=True)
        for label in ("native", "lab")
    ]
    assert summary.report(empty)[1] == 1


def test_the_two_parts_are_all_tests():
    native = suite.pytest_command(f"not {suite.DEVICE_MARKS}", Path("n.xml"), 9, ["-k", "a b"])
    assert native[-2:] == ["-k", "a b"]
    assert "not (rdma or qemu or root)" in native


def fed(chunks: list[bytes]) -> tuple[bytes, bool]:
    got: list[bytes] = []
    output = Output("feed5eed", got.append)
    for chunk in chunks:
        output.feed(chunk)
    return b"".join(got), output.ended


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_the_mark_ends_a_stream_however_it_is_cut(size):
    stream = b"\0\0feed\0text\n\0feed5ee\0feed5eed"
    text, ended = fed([stream[i : i + size] for i in range(0, len(stream), size)])
    assert text == b"\0\0feed\0text\n\0feed5ee"
    assert ended


def test_what_cannot_be_the_mark_is_passed_on_at_once():
    assert fed([b"line\n"]) == (b"line\n", False)
    assert fed([b"a\0b"]) == (b"a\0b", False)
    assert fed([b"a\0fee"]) == (b"a", False)


def test_the_job_keeps_words_and_directory():
    text = job.script(
        ["printf", "%s|", "a b", "c'd", "$HOME"],
        {"PATH": os.environ["PATH"], "SECRET": "x", "RDMA_X": "1 2", "PYTHONPATH": "/p"}
        | {"PYTHONDONTWRITEBYTECODE": "1"},
        "/",
    )
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "a b|c'd|$HOME|"
    assert "export RDMA_X='1 2'" in text
    assert "PYTHONPATH" in text
    assert "SECRET" not in text
    assert "PYTHONDONTWRITEBYTECODE" not in text
    assert "export RDMA_MIG_DEVICE=rxe0" in text


def test_directories_that_the_lab_would_hide_are_kept_once(tmp_path):
    inside = Path("/tmp") / "lab-test-directory"
    inside.mkdir(exist_ok=True)
    try:
        assert job.hidden([inside, Path("/usr"), inside], []) == [inside]
        assert job.hidden([inside], [inside]) == []
        assert job.hidden([Path("/tmp/there-is-none")], []) == []
    finally:
        inside.rmdir()
    odd = Path("/tmp") / "lab:test"
    odd.mkdir(exist_ok=True)
    try:
        with pytest.raises(LabError, match="lab:test"):
            job.hidden([odd], [])
    finally:
        odd.rmdir()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--memory", "lots", "--", "true"],
        ["--cpus", "0", "--", "true"],
        ["--timeout", "-1", "--", "true"],
        ["--accel", "magic", "--", "true"],
        ["--share", "/there-is-none", "--", "true"],
    ],
)
def test_bad_usage_is_refused(arguments):
    with pytest.raises(SystemExit) as refused:
        cli.parse(arguments)
    assert refused.value.code == 2


def test_options_of_the_command_are_its_own():
    options = cli.parse(["--memory", "2G", "--", "ls", "--memory", "-l"])
    assert options.command == ["ls", "--memory", "-l"]
    assert options.memory == "2G"


def test_paths_with_commas_reach_qemu_whole(tmp_path):
    settings = Settings(
        accel="tcg",
        memory="1G",
        cpus=1,
        image=Path("/k"),
        initramfs=Path("/i"),
        console=CACHE / "c",
        shares=[tmp_path / "a,b"],
    )
    try:
        line = settings.command({"status": 3})
    except LabError as error:
        pytest.fail(f"the lab's own tools are not installed: {error}")
    assert any(f"path={tmp_path}/a,,b," in word for word in line)


def test_the_archive_is_one_that_cpio_readers_take(tmp_path):
    archive = Archive()
    archive.directory("d")
    archive.directory("d")
    archive.file("d/f", b"12345", 0o644)
    image = archive.image()
    assert image.count(b"070701") == 3
    names, at = [], 0
    while True:
        size = int(image[at + 54 : at + 62], 16)
        length = int(image[at + 94 : at + 102], 16)
        name = image[at + 110 : at + 110 + length - 1].decode()
        names.append((name, size))
        at += (110 + length + 3) // 4 * 4 + (size + 3) // 4 * 4
        if name == "TRAILER!!!":
            break
    assert names == [("d", 0), ("d/f", 5), ("TRAILER!!!", 0)]
    assert at == len(image)


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"\0" * 0x202 + b"HdrS" + b"\0" * 1024])
def test_an_image_that_is_not_known_is_left_as_it_is(content):
    assert unpacked_image(content) is None


def test_the_command_says_how_it_is_used():
    lab = Path(__file__).with_name("run")
    done = subprocess.run(
        [sys.executable, str(lab), "--help"], capture_output=True, text=True, check=True
    )
    assert "125 the lab did not start" in done.stdout
