"""What is predicted agrees with real runs, on hosts of their own with links of a known rate."""

from __future__ import annotations

import pytest

from benchmarks.network import why_no_hosts
from benchmarks.planned import CASES, Case, compare

WITHIN = 0.2


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(why_no_hosts() is not None, reason=why_no_hosts() or "")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_what_is_predicted_comes_true(case: Case) -> None:
    found = compare(case)
    assert abs(found.off) <= WITHIN, found
