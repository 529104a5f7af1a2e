# SPDX-License-Identifier: Apache-2.0
"""Huge pages for a test: those of this kernel are nobody else's meanwhile. Needs root."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_NUMBER = Path("/proc/sys/vm/nr_hugepages")


@contextlib.contextmanager
def huge_pages_set_aside(count: int) -> Iterator[None]:
    """Let there be so many huge pages more; that they are there is part of it."""
    before = int(_NUMBER.read_text())
    try:
        _NUMBER.write_text(str(before + count))
        there = int(_NUMBER.read_text()) - before
        assert there == count, f"the kernel has found {there} huge pages, {count} are needed"
        yield
    finally:
        _NUMBER.write_text(str(before))
