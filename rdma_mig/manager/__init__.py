# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs, driven over their QMP sockets: checkpoint, restore, and from one to another."""
