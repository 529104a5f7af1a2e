# SPDX-License-Identifier: Apache-2.0
"""docker/ says what it is said to say; needs no engine. The engine's part is `make docker-test`."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import tomllib

import docker_kit as kit
import pytest
import yaml

DOCKER = kit.PROJECT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
DOCUMENT = kit.DOCUMENT.read_text()
ENTRYPOINT = (DOCKER / "entrypoint").read_text()


def stage(name: str) -> str:
    found = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert found, f"no stage {name}"
    return found[1]


# ---- the page ----


def test_every_command_of_the_page_is_run():
    documented = [line for lines in kit.commands().values() for line in lines]
    offline = [line for title in kit.OFFLINE for line in kit.commands()[title]]
    ran = [*kit.machine_commands(), *kit.device_commands(), *offline]
    assert sorted(documented) == sorted(ran)
    assert len(kit.machine_commands()) == 2
    assert kit.device_commands()[0] == "docker/setup-rxe"
    assert kit.device_commands()[-1] == "docker/setup-rxe --undo"
    # What looks like a command and is in no `sh` block would not be run.
    assert set(re.findall(r"^```(\w*)$", DOCUMENT, re.M)) == {"sh", ""}
    plain = re.findall(r"^```\n(.*?)^```$", re.sub(r"^```sh\n.*?^```$", "", DOCUMENT,
                                                   flags=re.M | re.S), re.M | re.S)  # fmt: skip
    assert not re.search(r"^(docker|make|python)", "".join(plain), re.M)


def test_three_commands_lead_to_a_guest_that_moved():
    assert [line.split()[0] for line in kit.commands()["A guest moves between two containers"]][
        :3
    ] == ["docker/setup-rxe", "docker-compose", "docker-compose"]


def test_the_wheels_of_the_page_are_those_that_the_build_asks_for():
    (line,) = kit.commands()["Without a package index"]
    named = set(shlex.split(line)[shlex.split(line).index(":all:") + 1 :])
    project = tomllib.loads((kit.PROJECT / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["test"],
    ]
    assert named == {re.split(r"[<>=]", requirement)[0] for requirement in wanted}


def test_the_table_has_every_message_of_the_entry_point():
    rows = re.findall(r"^\| `(.+?)` \|", DOCUMENT, re.M)
    fixed = [re.split(r"NAME|FILE| N ", row) for row in rows]
    # Text of f-strings, which ruff may have broken over lines.
    source = re.sub(r'"\s+f?"', "", ENTRYPOINT)
    for parts in fixed:
        for part in parts:
            words = part.removeprefix("/dev/infiniband/").replace("10001", "").strip()
            assert words in source, f"the entry point does not say: {words}"
    # As many as can be raised beside those that mean a broken host.
    assert len(rows) == 8


# ---- the images ----


def test_label_is_the_version():
    meson = (kit.PROJECT / "meson.build").read_text()
    version = re.search(r"version: '([^']+)'", meson)
    assert version
    assert f'image.version="{version[1]}"' in DOCKERFILE


def test_no_build_tools_and_no_root_at_run_time():
    for name in ("base", "runtime", "tests"):
        packages = stage(name).split()
        assert not {"gcc", "binutils", "libc6-dev", "python3-dev", "python3-venv"} & set(packages)
    assert "USER rdma-mig" in stage("runtime")
    assert "HEALTHCHECK" in stage("runtime")


def test_everything_that_is_copied_is_there_and_executable():
    for name in ("entrypoint", "move-guest", "run-tests", "setup-rxe"):
        assert os.access(DOCKER / name, os.X_OK)
    for words in re.findall(r"^COPY (docker/.*) \S+$", DOCKERFILE, re.M):
        for word in words.split():
            assert (kit.PROJECT / word).exists(), word


def test_context_leaves_out_what_is_made_here():
    ignored = (kit.PROJECT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert not {"!.venv", "!.lab", "!.git", "!test-logs"} & set(ignored)
    for line in ignored:
        if line.startswith("!"):
            assert (kit.PROJECT / line[1:]).exists(), line


# ---- the compose file ----


def compose() -> dict[str, dict]:
    """The services of the compose file, its anchors and merges resolved."""
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def test_compose_file_asks_for_what_is_needed_and_no_more():
    services = compose()
    assert set(services) == {"source", "destination", "tests"}
    for name, service in services.items():
        assert "privileged" not in service
        assert service["network_mode"] == "host"
        assert service["devices"] == ["/dev/infiniband:/dev/infiniband"]
        assert service["ulimits"] == {"memlock": -1}
        assert service["cap_drop"] == ["ALL"]
        # A bridge is not there with every engine.
        assert service["build"]["network"] == "host"
        assert f" AS {service['build']['target']}\n" in DOCKERFILE
        assert service["container_name"] == f"rdma-mig-{name}"
    for name in ("source", "destination"):
        assert "cap_add" not in services[name]
        assert services[name]["user"] == "${RDMA_MIG_USER:-10001:10001}"
        assert services[name]["security_opt"] == ["no-new-privileges:true"]
        assert services[name]["read_only"] is True
        assert "profiles" not in services[name]
    assert "useradd --uid 10001 " in DOCKERFILE
    assert services["tests"]["profiles"] == ["tests"]


def test_compose_file_keeps_to_what_both_versions_know():
    """docker-compose 1.29 takes no `name`, version 2 warns of `version`."""
    top = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert [key for key in top if not key.startswith("x-")] == ["services"]


# ---- setup-rxe, as far as a kernel without rxe goes ----


def setup_rxe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DOCKER / "setup-rxe", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_kernel_without_rxe_is_named_with_what_to_install():
    """Seen from a mount namespace without this kernel's modules, whether it has some or not."""
    places = "/lib/modules /sys/module"
    hide = f'for d in {places}; do [ ! -d $d ] || mount -t tmpfs none $d; done; exec "$@"'
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    result = subprocess.run(
        [*unshare, "sh", "-ec", hide, "sh", DOCKER / "setup-rxe"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"setup-rxe: this host's kernel ({os.uname().release}) has no rxe")
    assert "install" in line
    assert not os.path.exists("/sys/class/net/rxe-mig0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--address"], "name an IPv4 address"),
        (["--address", "192.0.2.256"], "192.0.2.256 is no IPv4 address"),
        (["--address", "fd00::1"], "fd00::1 is no IPv4 address"),
        (["--address", "010.0.0.1"], "010.0.0.1 is no IPv4 address"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_of_setup_rxe(arguments, named):
    result = setup_rxe(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("setup-rxe: ")
    assert named in line


def test_help_of_setup_rxe():
    result = setup_rxe("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("docker/setup-rxe [--undo] [--address ADDRESS]")


# ---- the workflow ----


def test_job_of_github_fails_closed():
    path = kit.PROJECT / ".github" / "workflows" / "docker.yml"
    if not path.exists():
        # An sdist comes without it.
        assert not (kit.PROJECT / ".github").exists()
        return
    text = path.read_text()
    assert "make docker-test" in text
    assert "continue-on-error" not in text
    assert "|| true" not in text
    assert "RDMA_MIG_DEVICE: rxe_mig" in text


def test_scripts_load():
    """Each Python script compiles and can be imported; running it takes a container."""
    for name in ("entrypoint", "move-guest"):
        assert callable(runpy.run_path(str(DOCKER / name))["main"])
