# SPDX-License-Identifier: Apache-2.0
"""The byte channel that a migration stream runs over."""
