# SPDX-License-Identifier: Apache-2.0
"""What a migration did, in figures: for Prometheus, and for whoever watches."""
