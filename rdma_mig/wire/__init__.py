# SPDX-License-Identifier: Apache-2.0
"""Bytes to values and back: no I/O, no verbs.

Decoding takes a peer's bytes as hostile and raises ``RemoteProtocolError``, nothing else; encoding
refuses bad values with ``LocalProtocolError``.
"""
