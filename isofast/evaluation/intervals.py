"""95 % confidence intervals of proportions and of their differences."""

import math

# two-sided 95 % quantile of the normal distribution
_Z = 1.959964


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the interval of a proportion of ``n`` trials (Wilson, JASA 1927)."""
    middle = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2)
    scale = 1 + _Z**2 / n
    # rounding must not leave [0, 1]
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def newcombe(share: float, other: float, n: int, m: int) -> tuple[float, float]:
    """Return the interval of ``share - other``, from ``n`` and ``m`` independent trials.

    The hybrid score interval, method 10 of Newcombe, Statistics in Medicine 17, 1998. It is too
    wide for paired trials that mostly agree, such as two networks on one set of images.
    """
    (low, high), (other_low, other_high) = wilson(share, n), wilson(other, m)
    gain = share - other
    return (
        gain - math.hypot(share - low, other_high - other),
        gain + math.hypot(high - share, other - other_low),
    )
