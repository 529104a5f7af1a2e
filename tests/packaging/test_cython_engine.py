# SPDX-License-Identifier: Apache-2.0
"""An engine in Cython can be compiled against the installed package, and calls what it finds there.

That pages arrive which were offered in this way is seen where there is a device (tests/rdma: the
Python call takes the same way).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import packaging_kit as kit
import pytest
from harness.compiling import compiled

from rdma_mig._hooks import PageTaker, ram_control_save_page


def test_engine_is_compiled_and_calls_the_taker_of_its_file(tmp_path: Path):
    loop = compiled(kit.PROJECT / "tests" / "rdma" / "hook_loop.pyx", tmp_path)
    with pytest.raises(NotImplementedError):
        loop.save(SimpleNamespace(page_taker=PageTaker()), 0, 0, 1)
    loop.save(SimpleNamespace(page_taker=PageTaker()), 0, 0, 0)
    with pytest.raises(TypeError):
        loop.save(SimpleNamespace(page_taker=object()), 0, 0, 1)


def test_page_that_fails_is_the_error_of_its_file():
    failed: list[Exception] = []

    def note(error: Exception) -> Exception:
        failed.append(error)
        return RuntimeError("the file's")

    file = SimpleNamespace(page_taker=PageTaker(), failed=note)
    with pytest.raises(RuntimeError, match="the file's"):
        ram_control_save_page(file, 0, 0, 4096)
    with pytest.raises(RuntimeError, match="the file's"):
        ram_control_save_page(file, -1, 0, 4096)
    assert [type(error) for error in failed] == [NotImplementedError, OverflowError]
