# SPDX-License-Identifier: Apache-2.0
import argparse

import pytest

from rdma_mig.cli.options import network, size


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("512M", 512 << 20), ("16G", 16 << 30), ("16g", 16 << 30), ("4KiB", 4096),
        ("4kB", 4096), ("1T", 1 << 40), ("100B", 100),
    ],
)  # fmt: skip
def test_sizes(text, value):
    assert size(text) == value


@pytest.mark.parametrize(
    "text", ["", "0", "G", "-1", "1.5G", "1P", "9" * 16, "9999999T", "1 G", "0x10", "\u0661"]
)
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as"):
        size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("192.0.2.7", "192.0.2.7/32"), ("192.0.2.7/24", "192.0.2.0/24"), ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:db8::1", "2001:db8::1/128"), ("2001:db8::/32", "2001:db8::/32"),
    ],
)  # fmt: skip
def test_networks(text, value):
    assert network(text) == value


@pytest.mark.parametrize("text", ["", "host", "192.0.2", "192.0.2.1/33", "[::1]", "192.0.2.1:4444"])
def test_what_is_no_network(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no address and no network"):
        network(text)
