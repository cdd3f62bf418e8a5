"""The kernel tests' parameters and error budgets."""

import pytest
import torch

from isofast_kernels.dispatch import INTERPRET

# CUDA and Triton's interpreter (`make interpret`) run the kernels, a plain CPU the reference
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
TRITON = INTERPRET or DEVICE == "cuda"
ON_DEVICE = [pytest.mark.gpu] if DEVICE == "cuda" else []
KERNELS_ONLY = pytest.mark.skipif(not TRITON, reason="no GPU; make interpret runs it without one")
CUDA_ONLY = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")]

LOSSES = [
    pytest.param("cosine", False, id="cosine"),
    pytest.param("cosine", True, id="iso_cosine"),
    pytest.param("euclidean", False, id="euclidean"),
    pytest.param("euclidean", True, id="iso_euclidean"),
]
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]


def relative_error(got, exact):
    """Frobenius error of `got`, relative to the float64 `exact`; NaN stays NaN."""
    assert exact.dtype == torch.float64
    return ((got.double() - exact).norm() / exact.norm()).item()


def assert_within_budget(name, got, torchs, exact):
    """`got` has at most twice the error of `torchs`, torch's result in the same dtype.

    The budget is at least two roundings of the result, as torch's error may be zero by luck.
    """
    assert got.dtype == torchs.dtype and got.shape == exact.shape
    budget = 2 * max(relative_error(torchs, exact), torch.finfo(got.dtype).eps)
    error = relative_error(got, exact)
    found = f"{name}: relative error {error:.2e}, budget {budget:.2e}"
    # shown by pytest -rP
    print(found)
    assert error <= budget, found
