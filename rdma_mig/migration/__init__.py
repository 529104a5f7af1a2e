# SPDX-License-Identifier: Apache-2.0
"""The migration engine: state, RAM hooks, and what it sends and receives."""
