# SPDX-License-Identifier: Apache-2.0
"""A kept guest to look at or to damage."""

import pytest
import snapshot_kit as kit


@pytest.fixture
def memories():
    with kit.guest() as found:
        yield found


@pytest.fixture
def kept(tmp_path, memories):
    return kit.keep(tmp_path / "vm", memories)
