"""What the fuzzers share: how many inputs, values of every kind, and what counts as a finding.

SD35_FUZZ_INPUTS says how many inputs each reader gets; without it a few, the same every time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sd35_core.errors import SD35Error

INPUTS = int(os.environ.get("SD35_FUZZ_INPUTS", 0))
WRITTEN = settings(
    max_examples=INPUTS or 150,
    derandomize=not INPUTS,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SECONDS = 5.0
"""Of the processor's time, for an input of a few kilobytes; other programs don't lengthen it."""
SIZES = st.sampled_from([0, 1, 2, 3, 16, 64, -1, 2**31, 2**63 - 1, 2**64])
TRICKS = ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "\0", "a" * 5000, "CON", "."]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | SIZES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def survives(read: Callable[[], Any]) -> Any:
    """What `read` gives; None after one of our errors. Anything else it raises is a finding."""
    started = time.thread_time()
    try:
        return read()
    except SD35Error as error:
        assert len(str(error)) > 20
        return None
    finally:
        assert time.thread_time() - started < SECONDS
