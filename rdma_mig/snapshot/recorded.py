# SPDX-License-Identifier: Apache-2.0
"""How the QEMU of a snapshot was started: ``command.json``; and who may have changed it since.

No digest covers it, since it does not follow from the migration's bytes. It is a program to run, so
what it is worth is decided by who can write to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdma_mig.errors import SnapshotError
from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.manifest import COMMAND
from rdma_mig.words import printable

__all__ = ["MAX_COMMAND", "RecordedCommand", "require_trustworthy"]

_FORMAT = "rdma-mig-command"
_VERSION = 1

MAX_COMMAND = 4 << 20
"""Most bytes of ``command.json``; a command line of Linux has 2 MiB at most by default."""

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class RecordedCommand:
    """A command line.

    Attributes:
        arguments: the program and its arguments; bytes that are no UTF-8 as surrogates.
        directory: its working directory.
    """

    arguments: tuple[str, ...]
    directory: str

    def encode(self) -> bytes:
        """The file's bytes: ASCII JSON, sorted keys, two spaces, a newline at the end."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "arguments": list(self.arguments),
            "directory": self.directory,
        }
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")

    @classmethod
    def decode(cls, raw: bytes, path: str) -> RecordedCommand:
        """Read the file's bytes.

        Args:
            raw: the bytes.
            path: the file, for the message.

        Raises:
            SnapshotError: it is not what encode() writes.
        """
        content: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(raw.decode("ascii"))
        if (
            not isinstance(content, dict)
            or content.keys() != {"format", "version", "arguments", "directory"}
            or content["format"] != _FORMAT
            or content["version"] != _VERSION
            or not isinstance(content["arguments"], list)
            or not content["arguments"]
            or not all(_is_word(word) for word in content["arguments"])
            or not content["arguments"][0]
            or not _is_word(content["directory"])
        ):
            raise SnapshotError(
                f"{path} is damaged, or of a newer version",
                remedy="remove the file: the snapshot does not need it",
            )
        return cls(tuple(content["arguments"]), content["directory"])


def _is_word(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def require_trustworthy(directory: Path) -> None:
    """Make sure that nobody but this user and root can have written a snapshot, or replace it.

    Looked at are the directory, everything in it, and the directories above it.

    Args:
        directory: of the snapshot.

    Raises:
        SnapshotError: somebody else can, or it cannot be looked at; the first finding is named.
    """
    # What a symbolic link on the way stands for counts, and the link's own directory as well.
    for place in {Path(os.path.abspath(directory)), directory.resolve()}:
        for above in place.parents:
            with _fs.failing("look at", above):
                found = above.stat()
            # In a sticky directory, such as /tmp, only its owner can replace an entry.
            _require(above, found, sticky=True)
    place = directory.resolve()
    with _fs.failing("look at", place):
        _require(place, place.stat())
        for root, directories, files in os.walk(place, onerror=_raise):
            for name in (*directories, *files):
                _require(path := Path(root, name), path.lstat())


def _raise(error: OSError) -> None:
    raise error


def _require(path: Path, found: os.stat_result, *, sticky: bool = False) -> None:
    shown = printable(path)
    if stat.S_ISLNK(found.st_mode):
        why, remedy = "is a symbolic link", "put the file itself there"
    elif found.st_uid not in (0, os.geteuid()):
        why, remedy = f"belongs to uid {found.st_uid}", f"chown it to uid {os.geteuid()}"
    elif found.st_mode & _OTHERS and not (sticky and found.st_mode & stat.S_ISVTX):
        why = f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
        remedy = f"chmod go-w {shown}"
    else:
        return
    raise SnapshotError(
        f"the recorded command is not run: {shown} {why}",
        remedy=f"what {COMMAND} says may be anybody's: read it (rdma-migrate inspect), then "
        f"{remedy}; or start the QEMU by a command of yours (--spawn)",
    )
