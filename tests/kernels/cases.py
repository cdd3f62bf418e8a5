"""What the kernel tests run over, and where."""

import pytest
import torch

from isofast_kernels.dispatch import INTERPRET

# a GPU, or Triton's interpreter (`make interpret`); else the operations run their definitions
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
ON_TRITON = [] if INTERPRET else [pytest.mark.gpu]
if DEVICE == "cpu" and not INTERPRET:
    ON_TRITON.append(pytest.mark.skip(reason="no GPU; make interpret runs these without one"))

LOSSES = [
    pytest.param("cosine", False, id="cosine"),
    pytest.param("cosine", True, id="iso_cosine"),
    pytest.param("euclidean", False, id="euclidean"),
    pytest.param("euclidean", True, id="iso_euclidean"),
]
NO_BF16 = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's bf16 is wrong")
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=NO_BF16),
]
