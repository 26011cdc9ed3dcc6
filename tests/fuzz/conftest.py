"""How long the property tests search: `make fuzz` for a night, a few seconds in the usual run.

A test here takes its settings from the profile: ``@settings.get_profile("fuzz")`` above ``@given``. `make fuzz` makes
it the default, for tests that derive their own from ``settings()``. The usual run tries the same examples each time, so
that what it finds is the fault of a change; a night's run draws new ones.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "15")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
)
