"""A training step's kernels on a GPU: whole batches, CUDA graphs, torch.compile, other devices."""

import pytest
import torch

from isofast_kernels import (
    asymmetric_loss_pair,
    correlation_ema_,
    matrix_power,
    reference,
    second_moment,
)
from isofast_kernels.dispatch import INTERPRET

from .cases import DTYPES
from .tolerances import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET or not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def training_step(corr, z1, z2, t1, t2):
    correlation_ema_(corr, [z1.detach(), z2.detach()], 0.9)
    w = matrix_power(corr, 0.5)
    loss = asymmetric_loss_pair(z1, z2, t1, t2, w)
    return loss, *torch.autograd.grad(loss, (z1, z2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [512, 2048])
def test_the_correlation_of_whole_batches_is_within_budget(rows, dtype):
    """Tensor cores add fp16 and bf16 products in their own accumulators, over all rows."""
    z = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    exact = reference.second_moment_reference([z.double()])
    own = reference.second_moment_reference([z])
    assert_within_budget("moment", second_moment(z), own, exact)


def test_the_compiled_step_is_one_graph(make_problem):
    z1, z2, t1, t2, _ = make_problem(256, 256, dtype=torch.bfloat16, device="cuda")
    z1.requires_grad_()
    z2.requires_grad_()

    def forward(corr):
        correlation_ema_(corr, [z1.detach(), z2.detach()], 0.9)
        return asymmetric_loss_pair(z1, z2, t1, t2, matrix_power(corr, 0.5))

    loss = torch.compile(forward, fullgraph=True)(torch.zeros(256, 256, device="cuda"))
    got = loss, *torch.autograd.grad(loss, (z1, z2))
    expected = training_step(torch.zeros(256, 256, device="cuda"), z1, z2, t1, t2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cuda_graph_replays_the_step(make_problem, dtype):
    """Capture fails on any host sync; the replay must give what eager execution gives."""
    z1, z2, t1, t2, _ = make_problem(256, 256, dtype=dtype, device="cuda")
    z1.requires_grad_()
    z2.requires_grad_()
    corr = torch.zeros(256, 256, device="cuda")
    expected_corr = corr.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        training_step(corr.clone(), z1, z2, t1, t2)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(corr, z1, z2, t1, t2)
    for _ in range(3):
        graph.replay()
        expected = training_step(expected_corr, z1, z2, t1, t2)
        assert torch.equal(corr, expected_corr)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_torch_s_global_precision_switches_change_nothing(make_problem):
    z1, z2, t1, t2, _ = make_problem(256, 256, dtype=torch.float32, device="cuda")
    z1.requires_grad_()
    z2.requires_grad_()
    expected = training_step(torch.zeros(256, 256, device="cuda"), z1, z2, t1, t2)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        got = training_step(torch.zeros(256, 256, device="cuda"), z1, z2, t1, t2)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_need_not_lie_on_the_current_device(make_problem):
    z1, z2, t1, t2, _ = make_problem(64, 64, dtype=torch.float32, device="cuda:1")
    z1.requires_grad_()
    z2.requires_grad_()
    with torch.cuda.device(1):
        expected = training_step(torch.zeros(64, 64, device="cuda:1"), z1, z2, t1, t2)
    with torch.cuda.device(0):
        got = training_step(torch.zeros(64, 64, device="cuda:1"), z1, z2, t1, t2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
