# SPDX-License-Identifier: Apache-2.0
"""Reads traces: as text, as a picture, and held against the rules of the protocol."""
