# SPDX-License-Identifier: Apache-2.0
"""What pyverbs cannot do, and what Python is too slow for."""
