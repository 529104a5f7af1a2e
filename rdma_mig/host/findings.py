# SPDX-License-Identifier: Apache-2.0
"""What was found out about a host, as values: a level, a line, and a command that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rdma_mig.errors import RemoteProtocolError

__all__ = ["Finding", "Level", "Report"]

# A report of another host is shown as it came: no more of it than fits a screen or two.
_MOST_FINDINGS = 256
_LONGEST_TEXT = 2000


class Level(StrEnum):
    """How bad a finding is; in this order."""

    OK = "ok"
    WARNING = "warning"
    BLOCKER = "blocker"

    @property
    def rank(self) -> int:
        """Its place in the order."""
        return list(Level).index(self)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: a word for what was looked at; the same on every host and in every version.
        level: whether a migration can work.
        message: one line; names the device, address or limit in question.
        remedy: what mends it, a command where there is one; empty where nothing needs mending.
    """

    check: str
    level: Level
    message: str
    remedy: str = ""

    @classmethod
    def from_json(cls, value: object) -> Finding:
        """Read what another host sent.

        Raises:
            RemoteProtocolError: it is no finding.
        """
        match value:
            case {
                "check": str(check),
                "level": str(level),
                "message": str(message),
                "remedy": str(remedy),
            } if level in list(Level):
                return cls(_text(check), Level(level), _text(message), _text(remedy))
        raise RemoteProtocolError("the other end sent a finding that is none")


@dataclass(frozen=True, slots=True)
class Report:
    """What was found on one host.

    Attributes:
        host: its name.
        findings: in the order in which they were looked at.
    """

    host: str
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """That of the worst finding."""
        return worst(self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints and what goes to the other host."""
        return {
            "host": self.host,
            "level": self.level.value,
            "findings": [asdict(finding) for finding in self.findings],
        }

    @classmethod
    def from_json(cls, value: object) -> Report:
        """Read what another host sent.

        Raises:
            RemoteProtocolError: it is no report.
        """
        match value:
            case {"host": str(host), "findings": list(found)} if len(found) <= _MOST_FINDINGS:
                return cls(_text(host), tuple(map(Finding.from_json, found)))
        raise RemoteProtocolError("the other end sent no report")


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the worst of them; ok where there is none."""
    return max((finding.level for finding in findings), key=lambda x: x.rank, default=Level.OK)


def _text(value: str) -> str:
    """A text of the other host, fit for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in value[:_LONGEST_TEXT])
