"""Fixtures for the kernel tests. Shape letters: B rows, D features, V views."""

import numpy as np
import pytest
import torch

from isofast_kernels import norm_pool_ops, ops
from isofast_kernels.dispatch import INTERPRET

from .cases import TRITON

GUARD = 4096
"""NaN elements on either side of a guarded tensor; keeps the alignment kernels rely on."""


def guarded_empty(shape, dtype, device, channels_last=False):
    """Return a NaN-filled tensor between two NaN guards, and the whole buffer."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    within = buffer[GUARD : GUARD + count]
    if channels_last:
        n, c, h, w = shape
        return within.view(n, h, w, c).permute(0, 3, 1, 2), buffer
    return within.view(shape), buffer


@pytest.fixture(autouse=INTERPRET)
def bf16_products(request, monkeypatch):
    """In bf16 tests, fix the interpreter's dot, which multiplies raw bits, and let bf16 use it."""
    call = getattr(request.node, "callspec", None)
    if call is None or torch.bfloat16 not in call.params.values():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def product(self, a, b, acc, *options):
        left, right = (
            (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.is_bf16() else x.data
            for x in (a, b)
        )
        return TensorHandle(np.matmul(left, right) + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
    for module in (ops, norm_pool_ops):
        monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)


@pytest.fixture
def guard_inputs():
    """Copy a tensor between NaN guards, so that an out-of-bounds read shows in the result.

    An out-of-bounds write fails the test.
    """
    buffers = []

    def guard(tensor):
        last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        copy, buffer = guarded_empty(tensor.shape, tensor.dtype, tensor.device, last)
        buffers.append(buffer)
        return copy.copy_(tensor)

    yield guard
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all(), "written before the start of a tensor"
        assert buffer[-GUARD:].isnan().all(), "written past the end of a tensor"


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Make torch.empty return NaN; an out-of-bounds write to such a tensor fails the test."""
    buffers = []
    empty = torch.empty

    def poisoned(*size, dtype=None, device=None, **options):
        dtype = dtype or torch.get_default_dtype()
        last = options == {"memory_format": torch.channels_last}
        if (options and not last) or not dtype.is_floating_point:
            return empty(*size, dtype=dtype, device=device, **options)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        tensor, buffer = guarded_empty(shape, dtype, device, last)
        buffers.append(buffer)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    assert buffers or not TRITON, "the operation under test allocated nothing through torch.empty"
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all(), "written before the start of an output"
        assert buffer[-GUARD:].isnan().all(), "written past the end of an output"


@pytest.fixture
def make_problem():
    """Make z1, z2, t1, t2 (B, D) with some alignment between views, and W (D, D) of rank > 1."""

    def make(rows, features, *, dtype=torch.float64, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shared = randn(rows, features)
        z1, z2, t1, t2 = (shared + 0.5 * randn(rows, features) for _ in range(4))
        basis = torch.linalg.qr(randn(features, features))[0]
        spectrum = torch.linspace(0.02, 1, features, dtype=torch.float64)
        w = (basis * spectrum) @ basis.T
        w_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        w = ((w + w.T) / 2).to(w_dtype)
        return *(x.to(device, dtype) for x in (z1, z2, t1, t2)), w.to(device)

    return make
