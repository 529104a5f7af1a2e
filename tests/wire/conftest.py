# SPDX-License-Identifier: Apache-2.0
"""Property tests of the codecs: reproducible, and slow machines do not fail them."""

from hypothesis import HealthCheck, settings

PROFILE = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("wire", PROFILE)
settings.load_profile("wire")
