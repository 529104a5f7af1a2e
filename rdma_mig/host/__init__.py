# SPDX-License-Identifier: Apache-2.0
"""What an operator wants to know of a host before a machine migrates."""
