"""On a GPU: full training batches, CUDA graphs, torch.compile, other devices."""

import pytest
import torch

from isofast_kernels import (
    asymmetric_loss_pair,
    augment_views,
    correlation_ema_,
    matrix_power,
    reference,
    second_moment,
)
from isofast_kernels.augment_reference import augment_views_reference

from .augment_problems import MEAN, STD, assert_levels, noise, random_rows, rows
from .cases import CUDA_ONLY, DTYPES, assert_within_budget

pytestmark = CUDA_ONLY


@pytest.fixture
def views(make_problem):
    """Make z1 and z2, which require gradients, and t1 and t2."""

    def make(dtype, size=256, device="cuda"):
        z1, z2, t1, t2, _ = make_problem(size, size, dtype=dtype, device=device)
        return z1.requires_grad_(), z2.requires_grad_(), t1, t2

    return make


def forward(corr, z1, z2, t1, t2):
    correlation_ema_(corr, [z1.detach(), z2.detach()], 0.9)
    return asymmetric_loss_pair(z1, z2, t1, t2, matrix_power(corr, 0.5))


def training_step(corr, z1, z2, t1, t2, forward=forward):
    loss = forward(corr, z1, z2, t1, t2)
    return loss, *torch.autograd.grad(loss, (z1, z2))


def first_step(views, **options):
    return training_step(views[0].new_zeros(views[0].shape, dtype=torch.float32), *views, **options)


def assert_equal(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [512, 2048])
def test_the_correlation_of_whole_batches_is_within_budget(rows, dtype):
    """Tensor cores add fp16 and bf16 products in their own accumulators, over all rows."""
    z = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    exact = reference.second_moment_reference([z.double()])
    own = reference.second_moment_reference([z])
    assert_within_budget("moment", second_moment(z), own, exact)


def test_the_compiled_step_is_one_graph(views):
    problem = views(torch.bfloat16)
    compiled = torch.compile(forward, fullgraph=True)
    assert_equal(first_step(problem, forward=compiled), first_step(problem))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cuda_graph_replays_the_step(views, dtype):
    """Capture fails on any host sync; the replay must match eager execution."""
    problem = views(dtype)
    corr = torch.zeros(256, 256, device="cuda")
    expected_corr = corr.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        training_step(corr.clone(), *problem)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(corr, *problem)
    for _ in range(3):
        graph.replay()
        expected = training_step(expected_corr, *problem)
        assert_equal((corr, *captured), (expected_corr, *expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_steps_give_the_same_bits(views, dtype):
    problem = views(dtype)
    first = first_step(problem)
    for _ in range(99):
        assert_equal(first_step(problem), first)


def test_torch_s_global_precision_switches_change_nothing(views):
    problem = views(torch.float32)
    expected = first_step(problem)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        got = first_step(problem)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert_equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_need_not_lie_on_the_current_device(views):
    problem = views(torch.float32, 64, "cuda:1")
    with torch.cuda.device(1):
        expected = first_step(problem)
    with torch.cuda.device(0):
        assert_equal(first_step(problem), expected)


def test_a_store_of_images_of_more_than_2_31_bytes():
    images = torch.zeros(180_000, 64, 64, 3, dtype=torch.uint8, device="cuda")
    last = noise(1, 64, 64)
    images[-1] = last[0].to("cuda")
    index = torch.tensor([len(images) - 1], device="cuda")
    table = rows(1, 1, 64, 64)
    kind = {"side": 64, "mean": MEAN, "std": STD}
    got = augment_views(images, index, table.to("cuda"), blur=False, **kind)
    expected = augment_views_reference(last, torch.zeros(1, dtype=torch.int64), table, **kind)
    assert_levels(got.cpu(), expected.permute(0, 1, 4, 2, 3), share=0.0)


def test_a_cuda_graph_replays_the_augmentation():
    """Capture fails on any host sync; new parameters in the same tensors give new views."""
    images, index = noise(8, 32, 32).to("cuda"), torch.arange(8, device="cuda")
    tables = [random_rows(2, 8, 32, 32, blur=True, seed=s).to("cuda") for s in range(3)]
    kind = {"side": 32, "mean": MEAN, "std": STD, "blur": True, "dtype": torch.bfloat16}
    expected = [augment_views(images, index, table, **kind) for table in tables]
    static = tables[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = augment_views(images, index, static, **kind)
    for table, want in zip(tables, expected, strict=True):
        static.copy_(table)
        graph.replay()
        assert torch.equal(captured, want)
