"""Which tensors run Triton, and where it launches."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .arguments import KERNEL_DTYPES

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton

    # Triton's own reading of TRITON_INTERPRET, which knows more words than 1
    INTERPRET = triton.knobs.runtime.interpret
else:
    INTERPRET = False


def runs_triton(*tensors: Tensor) -> bool:
    """Whether these tensors, all on one device, go to a Triton kernel.

    The interpreter takes no bfloat16: its products of it are wrong by orders of magnitude.
    """
    if not tensors[0].is_cuda:
        return INTERPRET and all(
            tensor.dtype in KERNEL_DTYPES and tensor.dtype != torch.bfloat16 for tensor in tensors
        )
    if not HAS_TRITON:
        raise RuntimeError("CUDA tensors need Triton, which is not installed: pip install triton")
    return True


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches there, wherever its data lie."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
