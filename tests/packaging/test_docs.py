# SPDX-License-Identifier: Apache-2.0
"""The documents say what is: commands parse, tables equal the code, links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import json
import re
import shlex
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import packaging_kit as kit
import pytest

from rdma_mig.cli import progress, reporting
from rdma_mig.cli.main import build_parser
from rdma_mig.errors import ExitStatus, MigrationError
from rdma_mig.migration import events

ROOT = kit.PROJECT
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "tests" / "lab" / "README.md",
]
# First parts of absolute paths that exist, or are made, on any Debian.
SYSTEM = {"dev", "etc", "lib", "mnt", "opt", "proc", "run", "sys", "tmp", "usr", "var"}


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def code_blocks(text: str, language: str = "") -> list[str]:
    # All of them, so that the end of one is not taken for the beginning of another.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in blocks if name == language]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


def table(text: str) -> list[list[str]]:
    """The rows of the first table, without its head."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def code_words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def shell_lines(text: str) -> list[str]:
    blocks = "".join(code_blocks(text, "sh")).replace("\\\n", " ")
    return [line.strip() for line in blocks.splitlines() if line.strip()]


# ---- links and paths ----


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    text = without_code(document.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if not target.startswith("https://"):
            path = document.parent / target.partition("#")[0]
            assert path.exists(), f"{target} does not exist"
            assert path.resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_are_those_of_any_machine(document):
    paths = re.findall(r"(?:^|[\s`'\"(=])/([\w.-]+)/", document.read_text(), re.MULTILINE)
    assert set(paths) <= SYSTEM


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_named_files_of_the_project_exist(document):
    words = code_words(without_code(document.read_text()))
    tops = ("rdma_mig/", "tests/", "cext/", "docs/", "demo/", "docker/", ".ci/")
    for word in words:
        path = word.split()[0].partition("::")[0].rstrip(",.:")
        if path.startswith(tops) and not re.search(r"[*<>]", path):
            assert (ROOT / path).exists(), f"{path} does not exist"


# ---- commands ----


def rdma_migrate_lines() -> list[str]:
    lines = [line for line in shell_lines(README) if line.startswith("rdma-migrate ")]
    assert {line.split()[1] for line in lines} >= {"incoming", "outgoing", "inspect", "--version"}
    return lines


@pytest.mark.parametrize("line", rdma_migrate_lines())
def test_commands_parse(line):
    words = shlex.split(line)[1:]
    if words[0].startswith("--"):
        with redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
            build_parser().parse_args(words)
        assert end.value.code == 0
    else:
        assert callable(build_parser().parse_args(words).run)


#: What runs the commands of a section, and a word by which it is seen there that it does.
RUN_BY = {
    ("README.md", "Try it"): {
        "tests/channel/test_channel_try.py": '"try"',
        "tests/interop/test_demo.py": '"demo"',
        ".ci/run": "make test",
    },
    ("README.md", "Install"): {
        "tests/packaging/test_documented_install.py": "Install",
        "docker/setup-rxe": "rdma link add",
    },
    ("README.md", "In containers"): {"tests/docker/test_docker_files.py": "three_commands"},
    ("README.md", "Check the hosts first"): {"tests/interop/test_readme.py": "Check the hosts"},
    ("README.md", "How fast will it be"): {"tests/interop/test_readme.py": "How fast will it be"},
    ("README.md", "Migrate a guest out of QEMU"): {
        "tests/interop/test_readme.py": "Migrate a guest out of QEMU"
    },
    ("README.md", "Migrate it into a QEMU again"): {
        "tests/interop/test_readme.py": "Migrate it into a QEMU again"
    },
    ("README.md", "Let rdma-migrate drive QEMU"): {
        "tests/manager/test_manager_readme.py": "Let rdma-migrate drive QEMU"
    },
    ("README.md", "Without RDMA"): {"tests/channel/test_channel_readme.py": "Without RDMA"},
    ("README.md", "Addresses, and hosts with several devices"): {
        "tests/interop/test_readme.py": "Addresses, and hosts with several devices"
    },
    ("README.md", "Look at a snapshot"): {"tests/interop/test_readme.py": "Look at a snapshot"},
    ("README.md", "Trace"): {"tests/interop/test_readme.py": '"Trace"'},
    ("CONTRIBUTING.md", "Set up"): {"tests/packaging/test_documented_install.py": "Set up"},
    ("CONTRIBUTING.md", "Edit and test"): {
        "tests/packaging/test_documented_install.py": "Edit and test",
        ".ci/run": "make lint",
        "tests/lab/suite.py": '"lab" / "run"',
    },
    ("docs/operating.md", ""): {"tests/rdma/test_rdma_operating.py": "operating.md"},
    ("docs/quick-start.md", ""): {"tests/manager/test_quick_start.py": "quick-start.md"},
    # Each of them: tests/docker/test_docker_files.py.
    ("docs/docker.md", ""): {"tests/docker/docker_kit.py": "docker.md"},
    ("docs/performance.md", "The measure"): {"tests/interop/test_bench_run.py": "make bench"},
}


def test_every_command_of_the_documents_is_run():
    seen = set()
    for document in DOCUMENTS:
        name = name_of(document)
        for part in re.split(r"^## ", document.read_text(), flags=re.MULTILINE):
            if shell_lines(part):
                whole = (name, "") in RUN_BY
                seen.add((name, "" if whole else part.splitlines()[0]))
    assert seen == {*RUN_BY}
    for runners in RUN_BY.values():
        for runner, word in runners.items():
            assert word in (ROOT / runner).read_text(), f"{runner} does not run {word}"


def all_options() -> set[str]:
    def of(parser: argparse.ArgumentParser) -> set[str]:
        found = set()
        for action in parser._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    found |= of(child)
        return found

    return of(build_parser())


def test_options_named_in_the_text_exist():
    words = [word for code in code_words(without_code(README)) for word in code.split()]
    ours = {word for word in words if word.startswith("--")}
    others = {"--privileged", "--config-settings"}
    assert ours - others
    assert ours - others <= all_options()


def test_every_option_of_the_commands_is_in_the_readme_or_its_help():
    """Those that change what a migration does are explained; -q and -v explain themselves."""
    assert all_options() - {"-h", "--help", "-o", "-j", "-q", "--quiet", "-v", "--verbose"} <= {
        word.strip("`,;:.") for word in README.split()
    }


@pytest.mark.parametrize("document", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    code = "\n".join([*shell_lines(document), *code_words(without_code(document))])
    named = set(re.findall(r"\bmake ([a-z-]+)", code)) - {"make"}
    assert {"demo", "test"} & named
    assert named <= targets


def test_the_documented_packages_are_those_that_make_installs():
    (line,) = (line for line in shell_lines(section(README, "Install")) if "apt-get" in line)
    documented = set(line.split()) - {"apt-get", "install", "-y"}
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    installed = re.search(r"^PACKAGES := (.*)$", makefile, re.MULTILINE)
    assert installed
    lab_and_tests = {"binutils", "busybox-static", "iproute2", "kmod", "qemu-system-x86"}
    assert set(installed[1].split()) - documented <= lab_and_tests
    assert documented <= set(installed[1].split())


def test_the_documented_build_requirements_are_pyproject_s():
    (line,) = (line for line in shell_lines(CONTRIBUTING) if "meson-python" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(shlex.split(line)[2:]) == set(project["build-system"]["requires"])


def test_qmp_lines_are_json():
    lines = [line for block in code_blocks(README) for line in block.splitlines()]
    commands = [json.loads(line)["execute"] for line in lines if line.startswith("{")]
    assert commands == [
        "migrate-set-capabilities",
        "migrate-set-parameters",
        "migrate",
        "query-migrate",
    ]


# ---- tables ----


def test_exit_statuses():
    rows = {int(status): meaning for status, meaning in table(section(README, "Exit status"))}
    assert set(rows) == {int(status) for status in ExitStatus}
    words = {
        ExitStatus.DONE: "done",
        ExitStatus.FAILED: "failed",
        ExitStatus.USAGE: "usage",
        ExitStatus.HOST_CANNOT: "host cannot",
        ExitStatus.PEER_BROKE_PROTOCOL: "peer broke the protocol",
        ExitStatus.TIMED_OUT_OR_CANCELLED: "timed out or cancelled",
    }
    for status, word in words.items():
        assert word in rows[int(status)]


def failed_event() -> dict[str, object]:
    out = io.StringIO()
    with redirect_stdout(out):
        reporting.Reporter(as_json=True, quiet=False, verbose=False).failed(MigrationError("no"))
    return json.loads(out.getvalue())


def test_events():
    documented = {
        code_words(event)[0]: code_words(keys) for event, keys in table(section(README, "Events"))
    }
    actual = {
        kind.event: [field.name for field in dataclasses.fields(kind)]
        for kind in events.MigrationEvent.__subclasses__()
    }
    failed = failed_event()
    assert failed.pop("event") == "failed"
    assert documented == {**actual, "failed": list(failed)}


def test_phases():
    text = section(README, "Events")
    (sentence,) = re.findall(r"`phase` is one of ([^;]*);", text)
    assert set(code_words(sentence)) == set(progress.PHASES)
    source = "".join(path.read_text() for path in (ROOT / "rdma_mig" / "migration").glob("*.py"))
    assert set(re.findall(r'Progress\("([\w-]+)"', source)) == set(progress.PHASES)


def test_markers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {line.split(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
    rows = re.search(r"^\| marker .*?(?=\n\n)", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    assert rows
    assert {code_words(marker)[0] for marker, _ in table(rows[0])} == declared


def test_test_folders():
    rows = re.search(r"^\| folder .*?(?=\n\n)", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    assert rows
    documented = {word for folder, *_ in table(rows[0]) for word in code_words(folder)}
    folders = {f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders == documented


# ---- architecture ----


def imported_rooms(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rdma_mig":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("rdma_mig.")
            }
    return found


def test_rooms_use_what_the_architecture_lets_them():
    rooms = {
        code_words(room)[0]: set(code_words(uses))
        for room, _, uses in table(
            section((ROOT / "docs" / "architecture.md").read_text(), "Rooms")
        )
    }
    package = ROOT / "rdma_mig"
    actual: dict[str, set[str]] = {}
    for source in package.rglob("*.py"):
        room = source.relative_to(package).parts[0].removesuffix(".py")
        if room != "__init__":
            actual.setdefault(room, set()).update(imported_rooms(source) - {room, "__version__"})
    assert set(actual) == set(rooms)
    for room, uses in actual.items():
        if room != "cli":
            assert uses == rooms[room], f"{room} uses {sorted(uses)}"


def test_changelog_has_this_version():
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == kit.source_version()


# ---- reliability ----


def test_faults_name_tests_that_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.search(r"^\| what goes wrong .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert rows
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", rows[0])
    assert len(named) > 40
    for file, name in named:
        [path] = (ROOT / "tests").glob(f"*/{file}")
        assert re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE), f"{file}::{name}"
    for row in table(rows[0]):
        assert any(re.search(r"::|the same", cell) for cell in row[2:]), row


def literals() -> list[str]:
    """Every text in the package's code, f-strings by their parts."""
    sources = [ast.parse(path.read_text()) for path in (ROOT / "rdma_mig").rglob("*.py")]
    return [
        node.value
        for source in sources
        for node in ast.walk(source)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_troubleshooting_quotes_messages_that_exist():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    spoken = literals()
    rows = [
        row
        for title in re.findall(r"^## (.*)$", text, re.MULTILINE)
        for row in table(section(text, title))
    ]
    assert len(rows) > 20
    quoted = [words for row in rows for words in code_words(row[0])]
    assert len(quoted) >= len(rows)
    assert [words for words in quoted if not any(words in said for said in spoken)] == []
