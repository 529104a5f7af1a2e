# SPDX-License-Identifier: Apache-2.0
"""A virtual machine with a stock Debian kernel and soft-RoCE, over the host's own file system."""
