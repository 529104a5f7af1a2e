# SPDX-License-Identifier: Apache-2.0
"""Verbs devices and connections; needs pyverbs, and is imported when first used."""
