"""Which tensors run Triton, and on which device it launches."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .arguments import KERNEL_DTYPES

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton

    # Triton's own parsing of TRITON_INTERPRET, which accepts more values than 1
    INTERPRET = triton.knobs.runtime.interpret
else:
    INTERPRET = False


def runs_triton(*tensors: Tensor) -> bool:
    """Return whether these tensors, all on one device, go to a Triton kernel.

    Not bfloat16 in the interpreter, whose bfloat16 products are wrong by orders of magnitude.
    """
    if INTERPRET:
        return all(
            tensor.dtype in KERNEL_DTYPES and tensor.dtype != torch.bfloat16 for tensor in tensors
        )
    if not tensors[0].is_cuda:
        return False
    if not HAS_TRITON:
        raise RuntimeError("CUDA tensors need Triton, which is not installed: pip install triton")
    return True


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context that makes the tensor's GPU current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
