"""95 % intervals against scipy and the literature."""

import pytest
from scipy.stats import binomtest

from isofast.evaluation.intervals import newcombe, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 50), (50, 50), (17, 40), (9134, 10_000)])
def test_the_interval_is_wilsons(right, n):
    want = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx((want.low, want.high), abs=1e-6)


def test_the_interval_of_a_gain_is_newcombes():
    """Table II of Newcombe (1998), method 10: 56/70 - 48/80 and 9/10 - 3/10."""
    assert newcombe(56 / 70, 48 / 80, 70, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe(0.9, 0.3, 10, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)
