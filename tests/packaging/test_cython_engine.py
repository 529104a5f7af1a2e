# SPDX-License-Identifier: Apache-2.0
"""An engine, and a transport, in Cython: compiled against the package, each calls the other.

That pages arrive which were offered in this way is seen where there is a device (tests/rdma).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import ModuleType

import packaging_kit as kit
import pytest
from harness.compiling import compiled

from rdma_mig._hooks import PageTaker
from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.errors import LocalProtocolError
from rdma_mig.migration.ram_control import (
    RAM_SAVE_CONTROL_DELAYED,
    RAM_SAVE_CONTROL_NOT_SUPP,
    ram_control_save_page,
)

LIMIT = 3 * 4096


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    source = kit.PROJECT / "tests" / "rdma" / "hook_loop.pyx"
    return compiled(source, tmp_path_factory.mktemp("compiled"))


class Pipe:
    """Where a file's bytes go; there are none."""

    def write(self, data: bytes) -> None:
        raise AssertionError("a page is no byte of the stream")

    def read(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


@pytest.fixture
def file(loop: ModuleType) -> Iterator[QEMUFile]:
    file = QEMUFile(Pipe())
    file.page_taker = loop.Listing(LIMIT)
    yield file
    file.close()
    assert file.page_taker is None


def test_engine_in_cython_offers_each_page(loop: ModuleType, file: QEMUFile):
    assert loop.save(file, 1 << 40, 4096, 2)
    assert file.page_taker.pages == [(1 << 40, 4096, 4096), (1 << 40, 8192, 4096)]
    with pytest.raises(ValueError, match="no such page"):
        loop.save(file, 0, 0, 4)
    file.page_taker = None
    assert not loop.save(file, 0, 0, 1)


def test_engine_in_python_offers_pages_to_it_too(file: QEMUFile):
    sent = ctypes.c_int(0)
    assert ram_control_save_page(file, 1 << 40, 8192, 4096, sent) == RAM_SAVE_CONTROL_DELAYED
    assert sent.value == 1
    taker = file.page_taker
    assert taker.pages == [(1 << 40, 8192, 4096)]
    taker.offer(0, 0, 1)
    assert taker.pages[1:] == [(0, 0, 1)]


@pytest.mark.parametrize(("offset", "why"), [(LIMIT, "no such page"), (-1, "convert negative")])
def test_page_that_fails_is_the_error_of_its_file(file: QEMUFile, offset: int, why: str):
    with pytest.raises(LocalProtocolError, match=why) as first:
        ram_control_save_page(file, 0, offset, 4096)
    # From now on nothing goes on, whichever way the next page is offered.
    assert file.page_taker is None
    with pytest.raises(LocalProtocolError) as later:
        ram_control_save_page(file, 0, 0, 4096)
    assert later.value is first.value


def test_page_of_a_file_without_hooks_goes_into_the_stream():
    assert ram_control_save_page(QEMUFile(Pipe()), 0, 0, 4096) == RAM_SAVE_CONTROL_NOT_SUPP


def test_taker_that_takes_nothing_is_no_taker(loop: ModuleType, file: QEMUFile):
    with pytest.raises(TypeError, match="derive a class"):
        PageTaker()
    file.page_taker = loop.Nothing()
    with pytest.raises(LocalProtocolError, match=r"Nothing has no take\(\)"):
        ram_control_save_page(file, 0, 0, 4096)
