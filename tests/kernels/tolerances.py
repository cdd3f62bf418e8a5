"""Error budgets: no worse than twice torch's own error in the same dtype, against float64.

The budget never falls below two roundings of the result: torch's error may be zero by luck, and
a number stored in a dtype is not better than that dtype.
"""

import torch
from torch import Tensor

FACTOR = 2.0


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius error of `got`, relative to the float64 `exact`; NaN stays NaN."""
    assert exact.dtype == torch.float64
    return ((got.double() - exact).norm() / exact.norm()).item()


def assert_within_budget(name: str, got: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """`got` is as near to `exact` as FACTOR times `torchs`, torch's result in got's dtype."""
    assert got.dtype == torchs.dtype and got.shape == exact.shape
    budget = FACTOR * max(relative_error(torchs, exact), torch.finfo(got.dtype).eps)
    error = relative_error(got, exact)
    assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.2e}"
