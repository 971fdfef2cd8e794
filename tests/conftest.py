"""Hypothesis profiles: `ci` finds the same examples in every run, `nightly` looks for new ones (HYPOTHESIS_PROFILE)."""

import os

from hypothesis import HealthCheck, settings

from tzip.coders.jit import compile_eagerly

_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, suppress_health_check=_SLOW)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# What is compiled only when it is worth it is tested all the same.
compile_eagerly()
