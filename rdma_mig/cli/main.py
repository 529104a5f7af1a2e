# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate``: parses the command line, runs one sub-command, turns errors into one line."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from rdma_mig.cli import (
    bench,
    checkpoint,
    clean,
    convert,
    doctor,
    incoming,
    inspect,
    migrate,
    outgoing,
    recover,
    restore,
    trace,
)
from rdma_mig.cli.signals import interrupted_by_signals
from rdma_mig.errors import ExitStatus, MigrationError

__all__ = ["main"]

_EPILOG = """\
exit status:
  0  done                          3  this host cannot (the message names the remedy)
  1  failed                        4  the peer broke the protocol
  2  wrong usage                   5  timed out or cancelled

environment:
  RDMA_MIG_DEBUG=1  print a traceback with each error
"""


class _Parser(argparse.ArgumentParser):
    """argparse, in one line: the usage of every option does not help who mistyped one."""

    def error(self, message: str) -> NoReturn:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        self.exit(ExitStatus.USAGE, f"rdma-migrate: {line}; see {self.prog} --help\n")


class _CommandParser(_Parser):
    """The parser of a sub-command, which names its own help for what it does not know."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Know all of them."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


class _Version(argparse.Action):
    """Works the version out only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(version_text())
        parser.exit()


def _built(module: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def version_text() -> str:
    """Return what ``--version`` prints: the version, and what of it can be used here."""
    from rdma_mig import __version__

    layer = "with" if _built("rdma_mig._verbs") else "without"
    pyverbs = "found" if _built("pyverbs") else "not found"
    return f"rdma-migrate {__version__} ({layer} RDMA layer, pyverbs {pyverbs})"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="rdma-migrate",
        description="Live migration of virtual machines over RDMA, wire compatible with QEMU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show version and exit")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    incoming.add_parser(commands)
    outgoing.add_parser(commands)
    checkpoint.add_parser(commands)
    restore.add_parser(commands)
    migrate.add_parser(commands)
    inspect.add_parser(commands)
    convert.add_parser(commands)
    clean.add_parser(commands)
    recover.add_parser(commands)
    doctor.add_parser(commands)
    bench.add_parser(commands)
    trace.add_parser(commands)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks how a command line may go on, and exit."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        _complete(parser)
    try:
        args = parser.parse_args(argv)
        with interrupted_by_signals():
            return int(args.run(args))
    except MigrationError as error:
        if os.environ.get("RDMA_MIG_DEBUG"):
            traceback.print_exc()
        message = " ".join(str(error).split())
        print(f"rdma-migrate: {message}", file=sys.stderr)
        return int(error.exit_status)
    except KeyboardInterrupt:
        print("rdma-migrate: interrupted", file=sys.stderr)
        return int(ExitStatus.TIMED_OUT_OR_CANCELLED)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        # Whoever read our output has gone, or its disk is full; Python would complain once more at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            print(f"rdma-migrate: standard output: {error.strerror}", file=sys.stderr)
        return int(ExitStatus.FAILED)


if __name__ == "__main__":
    sys.exit(main())
