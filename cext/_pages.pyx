# SPDX-License-Identifier: Apache-2.0
"""Per-page work without the GIL."""
