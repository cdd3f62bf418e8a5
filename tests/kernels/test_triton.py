"""The operations against float64: Triton on a GPU or in its interpreter, else the CPU path."""

import sys

import pytest
import torch

from isofast_kernels import (
    asymmetric_loss,
    asymmetric_loss_pair,
    correlation_ema_,
    matrix_power,
    matrix_power_triton,
    reference,
    second_moment,
)
from isofast_kernels.dispatch import INTERPRET
from isofast_kernels.matrix_power import power_by_products

from .cases import DEVICE, DTYPES, KERNELS_ONLY, LOSSES, ON_DEVICE, TRITON, assert_within_budget
from .emulation import TorchSteps

pytestmark = ON_DEVICE

# ragged in B and D, one row, one tile, more than one tile, wide tiles, more partial losses than are
# summed at a time
SHAPES = [(37, 129), (1, 256), (255, 250), (5, 32), (16, 64), (3, 17), (18, 600)]
SHAPES += [(2100, 5), (3, 1100)]
# the interpreter takes seconds for the large ones, so only in fp32 there
CASES = [
    pytest.param(*shape, *dtype.values, id=f"{shape[0]}x{shape[1]}-{dtype.id}", marks=dtype.marks)
    for dtype in DTYPES
    for shape in SHAPES
    if not INTERPRET or dtype.id == "fp32" or shape in [(37, 129), (1, 256), (3, 17)]
]
# on a CPU, other shapes or strides may change a matrix product's summation order
EXACT = {"rtol": 0, "atol": 0} if TRITON else {}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_losses(zs, targets, w, metric, isotropic):
    """Return the float64 loss and gradients of the operation's own inputs."""
    loss, gradients = 0.0, []
    for z, target in zip(zs, targets, strict=True):
        loss_B, dz_BD = reference.losses_and_gradients_reference(
            z.double(), target.double(), w.double(), metric=metric, isotropic=isotropic
        )
        loss = loss + loss_B.mean()
        gradients.append(dz_BD / len(z))
    return loss, *gradients


def torch_losses(zs, targets, w, metric, isotropic):
    """The definition in fp32 torch, by autograd: only the results are rounded to z's dtype.

    All rows at once, as in the operation: for one row a CPU computes W z with another routine,
    with about half the error.
    """
    leaves = [z.detach().requires_grad_() for z in zs]
    loss_N = reference.losses_reference(
        torch.cat(leaves), torch.cat(targets), w, metric=metric, isotropic=isotropic
    )
    loss = loss_N.unflatten(0, (len(zs), -1)).mean(1).sum()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
@pytest.mark.parametrize(("rows", "features", "dtype"), CASES)
def test_loss_pair(make_problem, guard_inputs, rows, features, metric, isotropic, dtype):
    results = []
    # the errors of few numbers, or of one row's loss, are a matter of luck: pool several draws
    for seed in range(16 if rows * features < 300 else 1):
        problem = make_problem(rows, features, dtype=dtype, device=DEVICE, seed=seed)
        z1, z2, t1, t2, w = (guard_inputs(x) for x in problem)
        leaves = [z1.requires_grad_(), z2.requires_grad_()]
        loss = asymmetric_loss_pair(z1, z2, t1, t2, w, metric=metric, isotropic=isotropic)
        found = loss.detach(), *torch.autograd.grad(loss, leaves)
        arguments = [z.detach() for z in leaves], [t2, t1], w, metric, isotropic
        results.append((found, torch_losses(*arguments), exact_losses(*arguments)))
    found, own, exact = (
        [torch.stack(draws) for draws in zip(*of, strict=True)] for of in zip(*results, strict=True)
    )
    for name, *compared in zip(("loss", "dz1", "dz2"), found, own, exact, strict=True):
        assert_within_budget(name, *compared)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
def test_one_direction_is_half_of_the_pair_bit_for_bit(make_problem, metric, isotropic):
    z1, z2, t1, t2, w = make_problem(37, 129, dtype=torch.float32, device=DEVICE)
    leaves = [z1.requires_grad_(), z2.requires_grad_()]
    kind = {"metric": metric, "isotropic": isotropic}
    pair = asymmetric_loss_pair(z1, z2, t1, t2, w, **kind)
    halves = [asymmetric_loss(z, t, w, **kind) for z, t in ((z1, t2), (z2, t1))]
    torch.testing.assert_close(pair, sum(halves), rtol=1e-6, atol=1e-7)
    for z, dz, half in zip(leaves, torch.autograd.grad(pair, leaves), halves, strict=True):
        torch.testing.assert_close(dz, torch.autograd.grad(half, z)[0], **EXACT)


@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
def test_collapsed_rows_are_finite_and_the_reference_s(make_problem, metric, isotropic):
    z, _, t, _, w = make_problem(20, 33, dtype=torch.float32, device=DEVICE)
    z[3], t[5], z[7], t[7] = 0, 0, 0, 0
    z[9] *= 1e-10
    t[11] *= 1e-9
    z.requires_grad_()
    loss = asymmetric_loss(z, t, w, metric=metric, isotropic=isotropic)
    (dz,) = torch.autograd.grad(loss, z)
    loss_B, dz_BD = reference.losses_and_gradients_reference(
        z.detach(), t, w, metric=metric, isotropic=isotropic
    )
    assert loss.isfinite() and dz.isfinite().all()
    torch.testing.assert_close(loss.detach(), loss_B.mean(), rtol=1e-5, atol=1e-6)
    for row in range(20):
        scale = dz_BD[row].abs().max().item() / 20
        torch.testing.assert_close(dz[row], dz_BD[row] / 20, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("where", ["z", "target", "w"])
def test_a_nan_comes_out(make_problem, where):
    z, _, t, _, w = make_problem(20, 33, dtype=torch.float32, device=DEVICE)
    {"z": z, "target": t, "w": w}[where][4, 6] = float("nan")
    assert asymmetric_loss(z, t, w).isnan()


def test_strided_arguments_are_taken(make_problem):
    z, _, t, _, w = make_problem(20, 66, dtype=torch.float32, device=DEVICE)
    strided = z[:, ::2], t[:, 33:], w[:33, :33]
    expected = asymmetric_loss(*(x.contiguous() for x in strided))
    torch.testing.assert_close(asymmetric_loss(*strided), expected, **EXACT)
    # of a width that is not padded
    views = z[:, 2:], t[:, :64]
    moment = second_moment([view.contiguous() for view in views])
    torch.testing.assert_close(second_moment(views), moment, **EXACT)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [129, 256, 32, 5, 520])
@pytest.mark.parametrize("rows", [(37,), (1, 95), (5, 3, 40)], ids=str)
def test_second_moment(guard_inputs, rows, features, dtype):
    views = tuple(guard_inputs(randn(count, features).to(DEVICE, dtype)) for count in rows)
    got = second_moment(views if len(views) > 1 else views[0])
    exact = reference.second_moment_reference([view.double() for view in views])
    assert torch.equal(got, got.T)
    assert_within_budget("moment", got, reference.second_moment_reference(views), exact)


@pytest.mark.skipif(not INTERPRET, reason="concerns the interpreter")
def test_the_interpreter_is_not_asked_for_bf16():
    z = randn(64, 64).bfloat16()
    assert torch.equal(second_moment(z), reference.second_moment_reference([z]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.998, 1.0])
def test_correlation_ema(guard_inputs, decay, dtype):
    """In place, reading only the lower triangle."""
    views = [randn(37, 129, seed=s).to(DEVICE, dtype) for s in range(2)]
    state = reference.second_moment_reference([3 * randn(200, 129, seed=2)]).to(DEVICE)
    above = torch.ones_like(state, dtype=torch.bool).triu(1)
    corr = guard_inputs(state.masked_fill(above, float("nan")))
    assert correlation_ema_(corr, views, decay) is corr
    assert torch.equal(corr, corr.T)
    exact = reference.correlation_ema_reference_(state.double(), [v.double() for v in views], decay)
    own = reference.correlation_ema_reference_(state, views, decay)
    assert_within_budget("corr", corr, own, exact)


def test_a_decay_of_zero_forgets_even_nan(guard_inputs):
    views = [randn(20, 33).to(DEVICE)]
    corr = guard_inputs(torch.full((33, 33), float("nan"), device=DEVICE))
    correlation_ema_(corr, views, 0.0)
    assert torch.equal(corr, second_moment(views))


def test_the_same_inputs_give_the_same_bits(make_problem):
    z1, z2, t1, t2, w = make_problem(20, 50, dtype=torch.float32, device=DEVICE)
    leaves = [z1.requires_grad_(), z2.requires_grad_()]

    def run():
        loss = asymmetric_loss_pair(z1, z2, t1, t2, w, metric="cosine", isotropic=False)
        corr = correlation_ema_(w.clone(), [z1, z2], 0.5)
        power = matrix_power(corr, 0.5)
        moment = second_moment([z1, z2])
        return loss.detach(), *torch.autograd.grad(loss, leaves), corr, power, moment

    first = run()
    for _ in range(99 if DEVICE == "cuda" else 9):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_stream_of_updates_stays_symmetric_and_positive():
    corr = torch.zeros(70, 70, device=DEVICE)
    for seed in range(5):
        correlation_ema_(corr, randn(11, 70, seed=seed).to(DEVICE), 0.5)
        assert torch.equal(corr, corr.T)
    s = torch.linalg.eigvalsh(corr.double())
    assert s[0] >= -70 * torch.finfo(torch.float32).eps * s[-1]


@KERNELS_ONLY
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("features", "alpha", "eps", "normalize"),
    [
        *((features, 0.5, 0.0, "spectral") for features in (64, 37)),
        *((37, alpha, 0.25, "spectral") for alpha in (0.25, 0.5, 1.0)),
        *((37, 2.0, 0.1, normalize) for normalize in ("spectral", "none")),
        (37, 0.5, 0.25, "none"),
        # more than one step along D, the other tile, a number of tiles that is not a power of two
        (190, 2.0, 0.0, "spectral"),
        (300, 2.0, 0.0, "none"),
    ],
)
def test_matrix_power(guard_inputs, monkeypatch, features, alpha, eps, normalize):
    """Against torch's products and float64, without a decomposition on the way."""
    z = randn(3 * features, features)
    corr = reference.second_moment_reference([z * torch.logspace(0, -2, features)])
    own = power_by_products(corr, alpha, eps, normalize, TorchSteps(corr, torch.matmul))
    exact = reference.matrix_power_reference(corr.double(), alpha, eps=eps, normalize=normalize)
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, None)
    w = matrix_power(guard_inputs(corr.to(DEVICE)), alpha, eps=eps, normalize=normalize)
    assert torch.equal(w, w.T) and w.is_contiguous()
    torch.testing.assert_close(w.cpu(), own, rtol=1e-4, atol=2e-5 * own.abs().max().item())
    error = torch.linalg.matrix_norm(w.cpu().double() - exact, 2)
    assert error <= 5e-4 * torch.linalg.matrix_norm(exact, 2)


def count_launches(monkeypatch, module, *names):
    """Return a list that gets the grid of each launch of the module's named kernels."""
    grids = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    for name in names:
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    return grids


@KERNELS_ONLY
@pytest.mark.parametrize(("isotropic", "launches"), [(True, 2), (False, 3)])
def test_the_launches_and_allocations_of_a_loss(monkeypatch, isotropic, launches):
    # the package's name is the function's
    module = sys.modules["isofast_kernels.asymmetric_loss"]
    grids = count_launches(monkeypatch, module, "_rows_times_w_kernel", "_loss_kernel")
    shapes, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda shape, **options: shapes.append(shape) or empty(shape, **options)
    )
    z, w = randn(2, 8, 32).to(DEVICE), torch.eye(32, device=DEVICE)
    asymmetric_loss_pair(*z, *z, w, isotropic=isotropic)
    assert len(grids) == launches
    # the counter, W z, the gradient, the loss and its parts
    assert shapes == [(), (2, 8, 32), (2, 8, 32), (), (2, 1)]


@KERNELS_ONLY
@pytest.mark.parametrize(
    ("alpha", "eps", "normalize", "launches"),
    [
        # C / tr C, its bound, A, the root; the other squares and the quotient share launches
        (0.5, 0.0, "spectral", 1 + 2 + 1 + 17),
        (0.5, 0.0, "none", 1 + 2 + 1 + 17),
        # the eigenvalue before A; three steps instead of six
        (0.5, 0.25, "spectral", 1 + 11 + 1 + 8),
        (1.0, 0.25, "spectral", 1 + 11 + 1),
    ],
)
def test_the_launches_of_a_matrix_power(monkeypatch, alpha, eps, normalize, launches):
    kernels = "_normalize_kernel", "_product_kernel", "_shift_kernel", "_finish_kernel"
    grids = count_launches(monkeypatch, matrix_power_triton, *kernels)
    corr = reference.second_moment_reference([randn(96, 32)]).to(DEVICE)
    matrix_power(corr, alpha, eps=eps, normalize=normalize)
    assert len(grids) == launches


POWERS = [(0.5, 0.0), (0.5, 0.25), (1.0, 0.2), (2.0, 0.25), (0.25, 0.2), (0.25, 0.0), (0.7, 0.3)]


@pytest.mark.parametrize("normalize", reference.NORMALIZATIONS)
@pytest.mark.parametrize(("alpha", "eps"), POWERS)
def test_matrix_power_of_zero_and_of_nan(alpha, eps, normalize):
    w = matrix_power(torch.zeros(20, 20, device=DEVICE), alpha, eps=eps, normalize=normalize)
    torch.testing.assert_close(w.cpu(), eps**alpha * torch.eye(20), rtol=1e-5, atol=0)
    for bits in (0x7FC00000, 0x7FFFFFFF, 0x7F800000, -0x800000):
        # NaNs as a CPU and a GPU produce them, and both infinities
        corr = torch.eye(20, device=DEVICE)
        corr.view(torch.int32)[[19, 1], [1, 19]] = bits
        assert matrix_power(corr, alpha, eps=eps, normalize=normalize).isnan().all()


@pytest.mark.parametrize("factor", [1e-24, 1e33])
@pytest.mark.parametrize(("alpha", "eps"), [(0.5, 0.0), (1.0, 0.2)])
def test_matrix_power_takes_any_scale(alpha, eps, factor):
    corr = reference.second_moment_reference([randn(100, 33)]).to(DEVICE)
    expected = matrix_power(corr, alpha, eps=eps)
    scaled = matrix_power(corr * factor, alpha, eps=eps)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-5)


@KERNELS_ONLY
@pytest.mark.parametrize("factor", [1e-30, 1e-44])
@pytest.mark.parametrize(("alpha", "eps"), POWERS[:5])
def test_a_dead_correlation_counts_as_zero(alpha, eps, factor):
    """As after 130 steps on zeros at decay 0.5."""
    corr = reference.second_moment_reference([randn(100, 33)]).to(DEVICE) * factor
    w = matrix_power(corr, alpha, eps=eps)
    torch.testing.assert_close(w, eps**alpha * torch.eye(33, device=DEVICE), rtol=1e-5, atol=0)
