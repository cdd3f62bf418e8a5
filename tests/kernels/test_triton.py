"""The Triton kernels against the float64 reference, loss and dz, on a GPU or the interpreter.

`TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py` runs them without a GPU;
test_interpreter.py does that within a plain run. bf16 is left to GPUs: the interpreter's bf16
products are wrong.
"""

import pytest
import torch

from isofast_kernels import (
    asymmetric_loss,
    asymmetric_loss_pair,
    correlation_ema_,
    reference,
    second_moment,
)
from isofast_kernels.ops import INTERPRET

from .tolerances import assert_within_budget

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRET else "cpu"
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu
elif not INTERPRET:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skip(reason="no GPU; test_interpreter.py runs these in Triton's interpreter"),
    ]

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(
        torch.bfloat16,
        id="bf16",
        marks=pytest.mark.skipif(DEVICE == "cpu", reason="wrong under the interpreter"),
    ),
]
LOSSES = [
    pytest.param("cosine", False, id="cosine"),
    pytest.param("cosine", True, id="iso_cosine"),
    pytest.param("euclidean", False, id="euclidean"),
    pytest.param("euclidean", True, id="iso_euclidean"),
]
# ragged in B and D, one row, one tile, more than one tile, wider than the 8-warp tile
SHAPES = [(37, 129), (1, 256), (255, 250), (5, 32), (16, 64), (3, 2), (18, 600)]


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
@pytest.mark.parametrize(("rows", "features"), SHAPES)
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
@pytest.mark.parametrize("features", [129, 256, 250, 32, 1, 5])
@pytest.mark.parametrize("rows", [(37,), (1, 255), (64, 64), (5, 3, 40)], ids=str)
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
        return loss.detach(), *torch.autograd.grad(loss, leaves), corr

    first = run()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
