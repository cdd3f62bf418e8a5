"""The public operations on the CPU: autograd, tracing, argument errors."""

from types import SimpleNamespace

import pytest
import torch

import isofast_kernels
from isofast_kernels import (
    asymmetric_loss,
    asymmetric_loss_pair,
    correlation_ema_,
    dispatch,
    matrix_power,
    reference,
    second_moment,
)

from .cases import LOSSES

OPS = torch.ops.isofast_kernels


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_gradcheck(make_problem, metric):
    """Only the plain losses: finite differences do not see IsoLoss's stop-gradients."""
    z1, z2, t1, t2, w = make_problem(4, 7)

    def pair(z1, z2):
        return asymmetric_loss_pair(z1, z2, t1, t2, w, metric=metric, isotropic=False)

    assert torch.autograd.gradcheck(pair, (z1.requires_grad_(), z2.requires_grad_()))


def test_gradients_flow_once_and_only_into_z(make_problem):
    z1, z2, t1, t2, w = (x.requires_grad_() for x in make_problem(5, 6))
    z2.requires_grad_(False)
    (dz,) = torch.autograd.grad(asymmetric_loss(z1, t2, w), z1, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(dz.sum(), z1)
    pair = asymmetric_loss_pair(z1, z2, t1, t2, w)
    kind = {"metric": "cosine", "isotropic": True}
    assert torch.equal(pair, asymmetric_loss_pair(z1, z2, t1, t2, w, **kind))
    pair.backward()
    assert z1.grad is not None and all(x.grad is None for x in (z2, t1, t2, w))
    # statistics are not part of the graph either
    assert not second_moment(z1).requires_grad
    assert not matrix_power(w, 0.5).requires_grad
    assert not correlation_ema_(w.detach().clone(), z1, 0.5).requires_grad


@pytest.mark.parametrize("is_cuda", [False, True])
def test_bfloat16_never_runs_in_the_interpreter(is_cuda, monkeypatch):
    """Its products are wrong by orders of magnitude."""
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    kinds = (torch.bfloat16, torch.float32)
    tensors = [SimpleNamespace(is_cuda=is_cuda, dtype=dtype) for dtype in kinds]
    assert [dispatch.runs_triton(tensor) for tensor in tensors] == [False, True]
    assert not dispatch.runs_triton(*tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_embeddings(make_problem, dtype):
    """fp32 inside: the gradient is the fp32 one rounded once, after the upstream scale."""
    z, _, _, t, w = make_problem(37, 129, dtype=dtype)
    z.requires_grad_()
    loss = asymmetric_loss(z, t, w)
    assert loss.dtype == torch.float32
    # 1 / B times a small slope: unscaled, half of these would be subnormal in fp16
    (dz,) = torch.autograd.grad(loss * 2.0**16, z)
    _, dz_BD = reference.losses_and_gradients_reference(
        z.detach(), t, w, metric="cosine", isotropic=True
    )
    assert dz.dtype == dtype
    assert torch.equal(dz, (dz_BD / 37 * 2.0**16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
def test_opcheck_loss(make_problem, metric, isotropic, dtype):
    z1, z2, t1, t2, w = make_problem(6, 9, dtype=dtype)
    z1.requires_grad_()
    z2.requires_grad_()
    # opcheck's AOT test assumes every result is differentiable, which the gradient itself is not;
    # test_compiles_without_a_graph_break covers that path
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        OPS.asymmetric_loss.default,
        ([z1, z2], [t2, t1], w, metric, isotropic),
        test_utils=utilities,
    )


def test_opcheck_statistics(make_problem):
    z1, z2, *_, w = make_problem(6, 9, dtype=torch.float32)
    torch.library.opcheck(OPS.correlation_ema_.default, (w.clone(), [z1, z2], 0.9))
    torch.library.opcheck(OPS.second_moment.default, ([z1, z2],))
    for corr in (w, w.T):
        for alpha, normalize in ((0.5, "spectral"), (1.0, "spectral"), (1.0, "none")):
            torch.library.opcheck(OPS.matrix_power.default, (corr, alpha, 0.1, normalize))


def step(corr, z1, z2, t1, t2, decay, eps, **loss):
    """This package's part of a training step."""
    correlation_ema_(corr, [z1, z2], decay)
    w = matrix_power(corr, 0.5, eps=eps)
    return asymmetric_loss_pair(2 * z1, 2 * z2, t1, t2, w, **loss)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(make_problem, dynamic, metric, isotropic):
    """opcheck cannot trace the loss's backward (dz has no double backward); this replaces it."""
    torch.compiler.reset()
    # the operations are opaque to inductor: one of its slow compilations is enough
    once = (dynamic, metric, isotropic) == (None, "cosine", True)
    backend = "inductor" if once else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows, decay, eps in ((16, 0.9, 0.1), (7, 0.5, 0.25), (33, 0.0, 0.2)):
        z1, z2, t1, t2, _ = make_problem(rows, 12, dtype=torch.float32)
        leaves = [z.bfloat16().requires_grad_() for z in (z1, z2)]
        results = []
        for function in (step, compiled):
            corr = torch.zeros(12, 12)
            loss = function(corr, *leaves, t1, t2, decay, eps, metric=metric, isotropic=isotropic)
            results.append((corr, loss, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(results[1], results[0])


Z, W = torch.randn(4, 6), torch.eye(6)


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda: asymmetric_loss(Z[0], Z, W), ["z_BD", "(6,)", "(B, D)"]),
        (lambda: asymmetric_loss(Z[:0], Z[:0], W), ["z_BD", "(0, 6)", "at least 1"]),
        (lambda: asymmetric_loss(Z, Z[:3], W), ["target_BD", "(3, 6)", "(4, 6)"]),
        (lambda: asymmetric_loss(Z, Z, W[:5, :5]), ["w_DD", "(5, 5)", "D = 6"]),
        (lambda: asymmetric_loss(Z, Z, W[:5]), ["w_DD", "(5, 6)", "(D, D)"]),
        (lambda: asymmetric_loss(Z, Z, W.half()), ["w_DD", "float16", ".float()"]),
        (lambda: asymmetric_loss(Z.int(), Z, W), ["z_BD", "int32", "bfloat16", ".float()"]),
        (lambda: asymmetric_loss(Z, Z, W, metric="l2"), ["'l2'", "'cosine'", "'euclidean'"]),
        (lambda: asymmetric_loss(Z, Z.to("meta"), W), ["cpu, meta", ".to(device)"]),
        (
            lambda: asymmetric_loss_pair(Z, Z.half(), Z, Z, W),
            ["z1_BD, z2_BD", "torch.float16, torch.float32"],
        ),
        (
            lambda: asymmetric_loss_pair(Z, Z, Z, Z.half(), W),
            ["t1_BD, t2_BD", "torch.float16, torch.float32"],
        ),
        (lambda: asymmetric_loss_pair(Z, Z, Z, Z[:2], W), ["t2_BD", "(2, 6)"]),
        (lambda: correlation_ema_(W.clone(), Z, 1.5), ["decay", "1.5", "between 0 and 1"]),
        (lambda: correlation_ema_(W.clone(), Z, float("nan")), ["decay", "nan"]),
        (lambda: correlation_ema_(W[:5, :5].clone(), Z, 0.5), ["(5, 5)", "D = 6"]),
        (lambda: correlation_ema_(torch.eye(12)[::2, ::2], Z, 0.5), ["contiguous", "(24, 2)"]),
        (lambda: correlation_ema_(W.half(), Z, 0.5), ["corr_DD", "float16"]),
        (lambda: correlation_ema_(W.clone(), [], 0.5), ["z_BD", "empty"]),
        (lambda: correlation_ema_(W.clone(), [Z, Z[:, :5]], 0.5), ["z_BD[1]", "(B, 5)"]),
        (lambda: second_moment([Z, Z.half()]), ["z_BD[1]", "float16"]),
        (lambda: second_moment([Z, Z[0]]), ["z_BD[1]", "(6,)"]),
        (lambda: second_moment([Z, Z.to("meta")]), ["cpu, meta", ".to(device)"]),
        (lambda: correlation_ema_(W.clone(), Z.to("meta"), 0.5), ["cpu, meta", ".to(device)"]),
        (lambda: matrix_power(W[:5], 0.5), ["corr_DD", "(5, 6)"]),
        (lambda: matrix_power(W, 0.0), ["alpha", "0.0", "identity"]),
        (lambda: matrix_power(W, float("inf")), ["alpha", "inf"]),
        (lambda: matrix_power(W, float("nan")), ["alpha", "nan", "finite"]),
        (lambda: matrix_power(W, 0.5, eps=-0.1), ["eps", "-0.1", "at least 0"]),
        (lambda: matrix_power(W, 0.5, eps=float("inf")), ["eps", "inf", "finite"]),
        (lambda: matrix_power(W, 0.5, eps=float("nan")), ["eps", "nan", "finite"]),
        (lambda: matrix_power(W, 0.5, normalize="max"), ["'max'", "'spectral'", "'none'"]),
    ],
)
def test_argument_errors_say_what_was_got_and_what_to_do(call, fragments):
    with pytest.raises(ValueError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_everything_public_is_documented():
    for name in isofast_kernels.__all__:
        public = getattr(isofast_kernels, name)
        # a module's call is its forward
        documentation = getattr(public, "forward", public).__doc__
        assert "Args:" in documentation and "Returns:" in documentation
        assert "Raises:" in documentation
