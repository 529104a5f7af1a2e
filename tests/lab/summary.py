# SPDX-License-Identifier: Apache-2.0
"""One closing account of several pytest runs, from their exit statuses and JUnit files.

It fails closed: a run that left no file, ended early, or ran nothing is a failure.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

# pytest's exit statuses that go with a whole account: all passed, some failed.
WHOLE = (0, 1)
NO_TESTS = 5
MEANINGS = {
    2: "interrupted, or an error while collecting",
    3: "internal error of pytest",
    4: "usage error of pytest",
    NO_TESTS: "no test was collected",
    124: "timed out",
    125: "the lab did not start",
}
SLOWEST = 8


@dataclass(frozen=True)
class Case:
    """One test: its name and what became of it."""

    name: str
    outcome: str
    seconds: float
    message: str = ""


@dataclass
class Part:
    """One run of pytest."""

    label: str
    status: int
    seconds: float
    cases: list[Case] = field(default_factory=list)
    problem: str | None = None


def _case(element: ElementTree.Element) -> Case:
    name = f"{element.get('classname', '')}::{element.get('name', '')}"
    seconds = float(element.get("time", "0"))
    for tag in ("failure", "error", "skipped"):
        found = element.find(tag)
        if found is None:
            continue
        if tag == "skipped" and found.get("type") == "pytest.xfail":
            return Case(name, "xfailed", seconds)
        lines = (found.get("message") or "").strip().splitlines() or [""]
        return Case(name, "skipped" if tag == "skipped" else "failed", seconds, lines[0][:160])
    return Case(name, "passed", seconds)


def read(label: str, status: int, seconds: float, junit: Path, may_be_empty: bool = False) -> Part:
    """Read one part; `may_be_empty` where the caller selected tests and may have missed it."""
    part = Part(label, status, seconds)
    if status == NO_TESTS and may_be_empty:
        return part
    meaning = MEANINGS.get(status, "")
    ended = f"exit status {status}" + (f", {meaning}" if meaning else "")
    try:
        root = ElementTree.parse(junit).getroot()
    except (OSError, ElementTree.ParseError) as error:
        part.problem = f"no results ({ended}): {error}"
        return part
    part.cases = [_case(element) for element in root.iter("testcase")]
    failed = any(case.outcome == "failed" for case in part.cases)
    if status not in WHOLE:
        part.problem = f"did not run to its end ({ended})"
    elif not part.cases:
        part.problem = "ran no test"
    elif failed != (status == 1):
        part.problem = f"{ended}, which its results do not explain"
    return part


def report(parts: list[Part]) -> tuple[list[str], int]:
    """Return the closing lines and the exit status: 0 only where all that ran has passed."""
    cases = [(part, case) for part in parts for case in part.cases]
    count = {
        outcome: sum(case.outcome == outcome for _, case in cases)
        for outcome in ("passed", "failed", "skipped", "xfailed")
    }
    problems = [f"{part.label}: {part.problem}" for part in parts if part.problem]
    if not count["passed"] and not count["failed"]:
        problems.append("no test ran at all")
    lines = []
    slowest = sorted(cases, key=lambda item: -item[1].seconds)[:SLOWEST]
    lines += [f"slowest {case.seconds:7.1f} s  {part.label}: {case.name}" for part, case in slowest]
    for outcome in ("skipped", "failed"):
        lines += [
            f"{outcome.upper()}  {part.label}: {case.name}  {case.message}".rstrip()
            for part, case in cases
            if case.outcome == outcome
        ]
    lines += [f"PROBLEM {problem}" for problem in problems]
    if count["skipped"]:
        lines.append("A test that was skipped has shown nothing: the run counts as failed.")
    if count["xfailed"]:
        lines.append(f"{count['xfailed']} failed as expected")
    shares = [f"{part.label} {len(part.cases)} in {part.seconds:.0f} s" for part in parts]
    lines.append(f"tests run: {', '.join(shares)}")
    # This form alone on the last line, since tools that read test logs look for it. What went
    # wrong beside the tests counts as a failure of its own.
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    lines.append(f"{count['passed']} passed, {count['failed'] + len(problems)} failed{skipped}")
    bad = bool(problems or count["failed"] or count["skipped"])
    return lines, int(bad)
