"""The Triton kernels against the float64 reference, loss and dz, on a GPU or the interpreter.

`make interpret` runs them without a GPU, but for bf16: the interpreter's products of it are wrong.
"""

import pytest
import torch

from isofast_kernels import (
    asymmetric_loss,
    asymmetric_loss_pair,
    correlation_ema_,
    matrix_power,
    reference,
    second_moment,
)
from isofast_kernels.matrix_power import power_by_products

from .cases import DEVICE, DTYPES, LOSSES, ON_TRITON
from .emulation import TorchSteps
from .tolerances import assert_within_budget

pytestmark = ON_TRITON

# ragged in B and D, one row, one tile, more than one tile, wider than the 8-warp tile
SHAPES = [(37, 129), (1, 256), (255, 250), (5, 32), (16, 64), (3, 17), (18, 600)]
# the interpreter takes seconds for the large ones: fp32 is enough for them there
CASES = [
    pytest.param(*shape, *dtype.values, id=f"{shape[0]}x{shape[1]}-{dtype.id}", marks=dtype.marks)
    for dtype in DTYPES
    for shape in SHAPES
    if DEVICE == "cuda" or dtype.id == "fp32" or shape in [(37, 129), (1, 256), (3, 17)]
]


def exact_losses(zs, targets, w, metric, isotropic):
    """float64 loss and gradients of the same numbers that the kernel was given."""
    loss, gradients = 0.0, []
    for z, target in zip(zs, targets, strict=True):
        loss_B, dz_BD = reference.losses_and_gradients_reference(
            z.double(), target.double(), w.double(), metric=metric, isotropic=isotropic
        )
        loss = loss + loss_B.mean()
        gradients.append(dz_BD / len(z))
    return loss, gradients


def torch_losses(zs, targets, w, metric, isotropic):
    """The definition in torch's fp32, by autograd: only the results are rounded to z's dtype."""
    leaves = [z.detach().requires_grad_() for z in zs]
    loss = sum(
        reference.losses_reference(z, t, w, metric=metric, isotropic=isotropic).mean()
        for z, t in zip(leaves, targets, strict=True)
    )
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
@pytest.mark.parametrize(("rows", "features", "dtype"), CASES)
def test_loss_pair(make_problem, guard_inputs, rows, features, metric, isotropic, dtype):
    problem = make_problem(rows, features, dtype=dtype, device=DEVICE)
    z1, z2, t1, t2, w = (guard_inputs(x) for x in problem)
    z1.requires_grad_()
    z2.requires_grad_()
    loss = asymmetric_loss_pair(z1, z2, t1, t2, w, metric=metric, isotropic=isotropic)
    gradients = torch.autograd.grad(loss, (z1, z2))

    zs, targets = [z1.detach(), z2.detach()], [t2, t1]
    exact, exact_gradients = exact_losses(zs, targets, w, metric, isotropic)
    own, own_gradients = torch_losses(zs, targets, w, metric, isotropic)
    assert_within_budget("loss", loss.detach(), own, exact)
    for name, got, torchs, want in zip(
        ("dz1", "dz2"), gradients, own_gradients, exact_gradients, strict=True
    ):
        assert_within_budget(name, got, torchs, want)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
def test_one_direction_is_half_of_the_pair_bit_for_bit(make_problem, metric, isotropic):
    z1, z2, t1, t2, w = make_problem(37, 129, dtype=torch.float32, device=DEVICE)
    leaves = [z1.requires_grad_(), z2.requires_grad_()]
    pair = asymmetric_loss_pair(z1, z2, t1, t2, w, metric=metric, isotropic=isotropic)
    one = asymmetric_loss(z1, t2, w, metric=metric, isotropic=isotropic)
    two = asymmetric_loss(z2, t1, w, metric=metric, isotropic=isotropic)
    torch.testing.assert_close(pair, one + two, rtol=1e-6, atol=1e-7)
    pair_dz = torch.autograd.grad(pair, leaves)
    assert torch.equal(pair_dz[0], torch.autograd.grad(one, z1)[0])
    assert torch.equal(pair_dz[1], torch.autograd.grad(two, z2)[0])


@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
def test_collapsed_rows_are_finite_and_the_reference_s(make_problem, metric, isotropic):
    z, _, t, _, w = make_problem(20, 33, dtype=torch.float32, device=DEVICE)
    z[3], t[5], z[7], t[7] = 0, 0, 0, 0
    z[9] *= 1e-10
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
    half = w[:33, :33]
    got = asymmetric_loss(z[:, ::2], t[:, 33:], half)
    expected = asymmetric_loss(z[:, ::2].contiguous(), t[:, 33:].contiguous(), half.contiguous())
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [129, 256, 32, 5])
@pytest.mark.parametrize("rows", [(37,), (1, 95), (5, 3, 40)], ids=str)
def test_second_moment(guard_inputs, rows, features, dtype):
    generator = torch.Generator().manual_seed(0)
    views = [
        guard_inputs(torch.randn(count, features, generator=generator).to(DEVICE, dtype))
        for count in rows
    ]
    got = second_moment(views)
    exact = reference.second_moment_reference([view.double() for view in views])
    own = reference.second_moment_reference(views)
    assert torch.equal(got, got.T)
    assert_within_budget("moment", got, own, exact)


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_the_interpreter_is_not_asked_for_bf16():
    z = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(second_moment(z), reference.second_moment_reference([z]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.998, 1.0])
def test_correlation_ema(guard_inputs, decay, dtype):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(37, 129, generator=generator).to(DEVICE, dtype) for _ in range(2)]
    state = reference.second_moment_reference([3 * torch.randn(200, 129, generator=generator)])
    corr = guard_inputs(state.to(DEVICE))
    exact = reference.correlation_ema_reference_(
        state.double().to(DEVICE), [view.double() for view in views], decay
    )
    own = reference.correlation_ema_reference_(state.to(DEVICE).clone(), views, decay)
    got = correlation_ema_(corr, views, decay)
    assert got is corr
    assert torch.equal(corr, corr.T)
    assert_within_budget("corr", corr, own, exact)


def test_a_weight_of_zero_forgets_even_nan(guard_inputs):
    views = [torch.randn(20, 33, generator=torch.Generator().manual_seed(0)).to(DEVICE)]
    corr = guard_inputs(torch.full((33, 33), float("nan"), device=DEVICE))
    correlation_ema_(corr, views, 0.0)
    assert torch.equal(corr, second_moment(views))


def test_of_the_state_the_lower_triangle_counts(guard_inputs):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(20, 70, generator=generator).to(DEVICE) for _ in range(2)]
    state = reference.second_moment_reference([torch.randn(200, 70, generator=generator)])
    expected = correlation_ema_(state.to(DEVICE).clone(), views, 0.5)
    above = torch.ones(70, 70, dtype=torch.bool).triu(1)
    corr = guard_inputs(state.masked_fill(above, float("nan")).to(DEVICE))
    correlation_ema_(corr, views, 0.5)
    assert torch.equal(corr, expected)
    assert torch.equal(corr, corr.T)


def test_a_stream_of_updates_stays_symmetric_and_positive():
    corr = torch.zeros(70, 70, device=DEVICE)
    for seed in range(5):
        z = torch.randn(11, 70, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        correlation_ema_(corr, z, 0.5)
        assert torch.equal(corr, corr.T)
    s = torch.linalg.eigvalsh(corr.double())
    assert s[0] >= -70 * torch.finfo(torch.float32).eps * s[-1]


def test_the_same_inputs_give_the_same_bits_ten_times(make_problem):
    z1, z2, t1, t2, w = make_problem(20, 70, dtype=torch.float32, device=DEVICE)
    leaves = [z1.requires_grad_(), z2.requires_grad_()]

    def run():
        loss = asymmetric_loss_pair(z1, z2, t1, t2, w, metric="cosine", isotropic=False)
        corr = correlation_ema_(w.clone(), [z1, z2], 0.5)
        power = matrix_power(corr, 0.5)
        moment = second_moment([z1, z2])
        return loss.detach(), *torch.autograd.grad(loss, leaves), corr, power, moment

    first = run()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("features", "alpha", "eps", "normalize"),
    [
        (64, 0.5, 0.0, "spectral"),
        (37, 0.5, 0.0, "spectral"),
        (37, 0.5, 0.25, "spectral"),
        (37, 0.5, 0.25, "none"),
        (37, 0.25, 0.25, "spectral"),
        (37, 1.0, 0.25, "spectral"),
        (37, 2.0, 0.1, "spectral"),
        (37, 2.0, 0.1, "none"),
    ],
)
def test_matrix_power(guard_inputs, features, alpha, eps, normalize):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3 * features, features, generator=generator)
    corr = reference.second_moment_reference([z * torch.logspace(0, -2, features)])
    w = matrix_power(guard_inputs(corr.to(DEVICE)), alpha, eps=eps, normalize=normalize)
    assert torch.equal(w, w.T)
    own = power_by_products(corr, alpha, eps, normalize, TorchSteps(corr, torch.matmul))
    torch.testing.assert_close(w.cpu(), own, rtol=1e-4, atol=2e-5 * own.abs().max().item())
    exact = reference.matrix_power_reference(corr.double(), alpha, eps=eps, normalize=normalize)
    error = torch.linalg.matrix_norm(w.cpu().double() - exact, 2)
    assert error <= 5e-4 * torch.linalg.matrix_norm(exact, 2)


@pytest.mark.parametrize(("alpha", "eps"), [(0.5, 0.0), (0.5, 0.25), (1.0, 0.25), (2.0, 0.25)])
def test_matrix_power_of_zero_and_of_nan(alpha, eps):
    w = matrix_power(torch.zeros(20, 20, device=DEVICE), alpha, eps=eps)
    torch.testing.assert_close(w.cpu(), eps**alpha * torch.eye(20), rtol=1e-5, atol=0)
    corr = torch.eye(20, device=DEVICE)
    corr[19, 1] = corr[1, 19] = float("nan")
    for normalize in reference.NORMALIZATIONS:
        assert matrix_power(corr, alpha, eps=eps, normalize=normalize).isnan().all()


@pytest.mark.parametrize("factor", [1e-24, 1e30])
@pytest.mark.parametrize(("alpha", "eps"), [(0.5, 0.0), (1.0, 0.2)])
def test_matrix_power_takes_any_scale(alpha, eps, factor):
    z = torch.randn(100, 33, generator=torch.Generator().manual_seed(0))
    corr = reference.second_moment_reference([z]).to(DEVICE)
    expected = matrix_power(corr, alpha, eps=eps)
    torch.testing.assert_close(
        matrix_power(corr * factor, alpha, eps=eps), expected, rtol=0, atol=1e-5
    )
    dead = matrix_power(corr * 1e-30, alpha, eps=eps)
    torch.testing.assert_close(dead, eps**alpha * torch.eye(33, device=DEVICE), rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_matrix_power_decomposes_nothing(monkeypatch, alpha):
    def refuse(*_):
        raise AssertionError("an eigendecomposition on the step")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    monkeypatch.setattr(torch.linalg, "eigvalsh", refuse)
    assert matrix_power(torch.eye(32, device=DEVICE), alpha).isfinite().all()
