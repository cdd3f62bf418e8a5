"""Fused BatchNorm, ReLU and max pool: the reference, and the operations against it."""

import pytest
import torch
from torch.nn import functional

from isofast_kernels import norm_pool, reference
from isofast_kernels.norm_pool_ops import norm_pool as pool
from isofast_kernels.norm_pool_ops import norm_pool_gradient, norm_pool_sums

from .cases import DEVICE, DTYPES, ON_DEVICE, TRITON, assert_within_budget

pytestmark = ON_DEVICE

# V, then x: odd and even sides, one column, tiles ending within an image, channels beyond a tile
SHAPES = [(1, (2, 3, 5, 8)), (2, (2, 16, 9, 1)), (2, (4, 80, 6, 7)), (2, (2, 64, 23, 20))]
CASES = pytest.mark.parametrize(
    ("views", "shape"), [pytest.param(v, s, id="x".join(map(str, (v, *s)))) for v, s in SHAPES]
)


def problem(views, shape, dtype=torch.float32):
    """x, dy, mean, slope, bias, shift and along; two slopes are 0, one of them with bias 0."""
    generator = torch.Generator().manual_seed(0)
    n, channels, height, width = shape

    def randn(*size):
        return torch.randn(size, generator=generator)

    x = randn(*shape) + 1
    dy = randn(n, channels, (height + 1) // 2, (width + 1) // 2)
    mean, slope, shift, along = (randn(views, channels) for _ in range(4))
    bias = randn(channels)
    slope[:, 1:3] = 0
    bias[2] = 0
    images = [image.to(DEVICE, dtype, memory_format=torch.channels_last) for image in (x, dy)]
    return *images, *(of.to(DEVICE) for of in (mean, slope, bias, shift, along))


@CASES
def test_the_reference_is_torchs(views, shape):
    x, dy, mean, slope, bias, *_ = (part.double() for part in problem(views, shape))
    leaf = x.clone().requires_grad_()
    of_x = [reference.of_images(of, x) for of in (mean, slope)]
    y = functional.max_pool2d(((leaf - of_x[0]) * of_x[1] + bias[:, None, None]).relu(), 3, 2, 1)
    ours, taps = reference.norm_pool_reference(x, mean, slope, bias)
    torch.testing.assert_close(ours, y.detach())
    assert torch.equal(taps == 9, y == 0)
    g = reference.norm_pool_gradient_reference(dy, taps, x, torch.float64)
    torch.testing.assert_close(g * of_x[1], torch.autograd.grad(y, leaf, dy)[0])


@pytest.mark.usefixtures("poisoned_empty")
@CASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(views, shape, dtype, guard_inputs):
    x, _, mean, slope, bias, *_ = map(guard_inputs, problem(views, shape, dtype))
    y, taps = pool(x, mean, slope, bias)
    of = mean, slope, bias
    exact_y, exact_taps = reference.norm_pool_reference(x.double(), *(t.double() for t in of))
    assert_within_budget("y", y, reference.norm_pool_reference(x, *of)[0], exact_y)
    assert torch.equal(taps, exact_taps)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # whatever the memory layouts
    assert torch.equal(pool(x.contiguous(), *(t.T.contiguous().T for t in of[:2]), bias)[0], y)


@pytest.mark.usefixtures("poisoned_empty")
@CASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(views, shape, dtype, guard_inputs):
    x, dy, *of = map(guard_inputs, problem(views, shape, dtype))
    mean, slope, bias, shift, along = of
    taps = pool(x, mean, slope, bias)[1]
    found = norm_pool_sums(dy, taps, x, mean)
    dx = norm_pool_gradient(dy, taps, x, mean, slope, shift, along)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    by_torch, exact = (by_definition(dy, taps, x, of, t) for t in (torch.float32, torch.float64))
    for name, got, torchs, right in zip(("sums", "dx"), (found, dx), by_torch, exact, strict=True):
        assert_within_budget(name, got, torchs.to(got.dtype), right)
    # whatever the memory layouts
    images = [image.contiguous() for image in (dy, taps, x)]
    columns = [t.T.contiguous().T for t in (mean, slope, shift, along)]
    torch.testing.assert_close(norm_pool_sums(*images, columns[0]), found)
    torch.testing.assert_close(norm_pool_gradient(*images, *columns), dx)


def by_definition(dy, taps, x, of, dtype):
    mean, slope, _, shift, along = (
        reference.of_images(t.to(dtype).view(-1, x.shape[1]), x) for t in of
    )
    g = reference.norm_pool_gradient_reference(dy, taps, x, dtype)
    centred = x.to(dtype) - mean
    sums = torch.stack([g, g * centred]).unflatten(1, (len(of[0]), -1)).sum((2, 4, 5))
    return sums, slope * g - shift - along * centred


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(bad):
    """It enters the statistics of its view and channel, and so all of their outputs."""
    x, _, mean, slope, bias, *_ = problem(2, (2, 16, 6, 6))
    x[0, 3, 2, 2] = bad
    mean[0, 3], slope[0, 3] = x[0, 3].mean(), x[0, 3].var().rsqrt()
    y = pool(x, mean, slope, bias)[0]
    assert y[0, 3].isnan().all() and y.isnan().sum() == y[0, 3].numel()


@pytest.mark.skipif(not TRITON, reason="on a CPU the sums are torch's")
def test_equal_numbers_go_to_the_first_and_sums_are_the_same_bits(monkeypatch):
    x, dy, mean, slope, bias, *_ = problem(2, (4, 64, 24, 24))
    x = x.round()
    taps = pool(x, mean, slope, bias)[1]
    assert torch.equal(taps, reference.norm_pool_reference(x, mean, slope, bias)[1])
    found = [norm_pool_sums(dy, taps, x, mean) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    monkeypatch.setattr(norm_pool, "SUMMED_TILES", 1)
    torch.testing.assert_close(norm_pool_sums(dy, taps, x, mean), found[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("views", [1, 2])
def test_opcheck(views):
    x, dy, mean, slope, bias, shift, along = problem(views, (2, 4, 6, 5))
    taps = pool(x, mean, slope, bias)[1]
    operations = torch.ops.isofast_kernels
    for operation, arguments in (
        (operations.norm_pool, (x, mean, slope, bias)),
        (operations.norm_pool_sums, (dy, taps, x, mean)),
        (operations.norm_pool_gradient, (dy, taps, x, mean, slope, shift, along)),
    ):
        torch.library.opcheck(operation, arguments)
