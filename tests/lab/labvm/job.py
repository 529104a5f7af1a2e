# SPDX-License-Identifier: Apache-2.0
"""The command as the guest gets it: its directory, environment, and what must be mounted."""

import os
import re
import shlex
from pathlib import Path

from labvm.host import PROJECT, LabError, need

DEVICE = "rxe0"
PASSED_ON = re.compile(r"PATH|HOME|VIRTUAL_ENV|CI|(RDMA_|PY|MESONPY_|HYPOTHESIS_).*")
# In the lab, caches of compiled modules are thrown away anyway, and emulated Python needs them.
NOT_PASSED_ON = ("PYTHONDONTWRITEBYTECODE",)
# The lab mounts its own here; directories of the host below them are brought back one by one.
HIDDEN = (Path("/tmp"), Path("/run"), Path("/dev/shm"))


def script(command: list[str], environment: dict[str, str], directory: str) -> str:
    """Return the bash script that the guest runs."""
    passed = {
        name: value
        for name, value in environment.items()
        if PASSED_ON.fullmatch(name) and name not in NOT_PASSED_ON
    }
    # An unprivileged caller's PATH may lack the system directories; the job is root.
    passed["PATH"] = f"{passed.get('PATH', os.defpath)}:/usr/sbin:/usr/bin:/sbin:/bin"
    passed["RDMA_MIG_DEVICE"] = DEVICE
    lines = [f"cd {shlex.quote(directory)} || exit 125"]
    lines += [f"export {k}={shlex.quote(v)}" for k, v in sorted(passed.items())]
    return "\n".join([*lines, "exec " + shlex.join(command)]) + "\n"


def hidden(wanted: list[Path], shares: list[Path]) -> list[Path]:
    """Return those of the `wanted` directories that the lab's own mounts would hide."""
    kept: list[Path] = []
    for path in sorted(set(wanted)):
        below = any(top in path.parents for top in HIDDEN)
        covered = any(path == top or top in path.parents for top in [*kept, *shares])
        if below and not covered and path.is_dir():
            if re.search(r"[:,\\]", str(path)):
                raise LabError("host", f"{path}: an overlay takes no path with these characters")
            kept.append(path)
    return kept


def guest_files(
    command: list[str],
    shares: list[Path],
    modules: Path,
    end: str,
    terminal: os.terminal_size | None,
) -> dict[str, bytes]:
    """Return what the guest's scripts read about this run; with `terminal`, the job gets one."""
    environment = dict(os.environ)
    job = script(command, environment, str(Path.cwd()))
    if terminal is not None:
        job = f"export TERM={shlex.quote(environment.get('TERM', 'linux'))}\n{job}"
    size = terminal or os.terminal_size((80, 24))
    config = {
        "LAB_MODULES": str(modules),
        "LAB_IP": need("ip"),
        "LAB_RDMA": need("rdma"),
        "LAB_TERMINAL": "no" if terminal is None else "yes",
        "LAB_ROWS": str(size.lines),
        "LAB_COLUMNS": str(size.columns),
        "LAB_END": end,
        # One stream where the caller has one, so that the order of lines is kept.
        "LAB_MERGE": "yes" if os.path.sameopenfile(1, 2) else "no",
    }
    wanted = [PROJECT, Path.cwd().resolve()]
    if "VIRTUAL_ENV" in environment:
        wanted.append(Path(environment["VIRTUAL_ENV"]).resolve())
    return {
        "config": "".join(f"{k}={shlex.quote(v)}\n" for k, v in config.items()).encode(),
        "job": job.encode(),
        "kept": "".join(f"{path}\n" for path in hidden(wanted, shares)).encode(),
        "shares": "".join(f"{path}\n" for path in shares).encode(),
    }
