"""What the fuzzers share: how many inputs, and values of every kind.

SD35_FUZZ_INPUTS says how many inputs each reader gets; without it a few, the same every time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("SD35_FUZZ_INPUTS", 0))
WRITTEN = settings(
    max_examples=INPUTS or 150,
    derandomize=not INPUTS,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SIZES = st.sampled_from([0, 1, 2, 3, 16, 64, -1, 2**31, 2**63 - 1, 2**64])
TRICKS = ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "\0", "a" * 5000, "CON", "."]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | SIZES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
