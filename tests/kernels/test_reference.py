"""The specification against the paper's equations, written out here, in float64."""

import pytest
import torch

from isofast_kernels import reference

from .cases import LOSSES

SHAPES = [(37, 129), (1, 16), (8, 5), (3, 1)]
EPS = torch.finfo(torch.float64).eps


def paper_loss(z, t, w, metric, isotropic):
    """One sample, as printed: W^(1/2) is formed; only IsoLoss has stop-gradients here."""
    p = w @ z
    if metric == "euclidean":
        if isotropic:  # P Eq. 15
            return 0.5 * torch.linalg.vector_norm(z - (t + z - w @ z).detach()) ** 2
        return 0.5 * torch.linalg.vector_norm(p - t) ** 2
    norm_p, norm_t = torch.linalg.vector_norm(p), torch.linalg.vector_norm(t)
    if not isotropic:
        return -torch.dot(p / norm_p, t / norm_t)
    # P Eq. 17
    s, u = torch.linalg.eigh(w)
    root = u @ torch.diag(s.clamp_min(0).sqrt()) @ u.T
    first = -torch.dot(z, t) / (norm_p.detach() * norm_t)
    second = torch.dot(p, t).detach() / (2 * norm_p.detach() ** 3 * norm_t)
    return first + second * torch.linalg.vector_norm(root @ z) ** 2


@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
@pytest.mark.parametrize(("rows", "features"), SHAPES)
def test_losses_and_gradients_are_the_papers(make_problem, rows, features, metric, isotropic):
    z, _, _, t, w = make_problem(rows, features)
    loss, dz = reference.losses_and_gradients_reference(z, t, w, metric=metric, isotropic=isotropic)
    both_dz, dt = reference.two_sided_gradients_reference(z, t, w, metric=metric)
    assert isotropic or torch.equal(both_dz, dz)
    for row in range(rows):
        z_D, t_D = z[row].clone().requires_grad_(), t[row].clone().requires_grad_()
        expected = paper_loss(z_D, t_D, w, metric, isotropic)
        gradient, target_gradient = torch.autograd.grad(expected, (z_D, t_D), allow_unused=True)
        torch.testing.assert_close(loss[row], expected.detach(), rtol=1e-12, atol=1e-13)
        # iso cosine in one dimension: both terms cancel, so the scale is |t| / (ab), not |dz|
        atol = 1e-12 / w.norm().item() if isotropic else 1e-13
        torch.testing.assert_close(dz[row], gradient, rtol=1e-11, atol=atol)
        if not isotropic:
            torch.testing.assert_close(dt[row], target_gradient, rtol=1e-11, atol=1e-12)


def test_the_papers_target_gradient_differs_only_in_the_stated_term(make_problem):
    z, _, _, t, w = make_problem(37, 129)
    dz, paper = reference.two_sided_gradients_reference(
        z, t, w, metric="cosine", paper_gradient=True
    )
    true_dz, true = reference.two_sided_gradients_reference(z, t, w, metric="cosine")
    p = z @ w
    a, b = p.norm(dim=-1, keepdim=True), t.norm(dim=-1, keepdim=True)
    d = (p * t).sum(-1, keepdim=True)
    difference = d * t / (a**3 * b) - d * t / (a * b**3)
    assert difference.norm() > true.norm(), "the case must distinguish the two forms"
    assert torch.equal(dz, true_dz)
    torch.testing.assert_close(paper - true, difference, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="for metric 'cosine'"):
        reference.two_sided_gradients_reference(z, t, w, metric="euclidean", paper_gradient=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
@pytest.mark.parametrize("collapsed", ["z", "target", "both"])
def test_a_collapsed_batch_gives_finite_numbers(make_problem, collapsed, metric, isotropic, dtype):
    z, _, _, t, w = make_problem(4, 16, dtype=dtype)
    z = torch.zeros_like(z) if collapsed in ("z", "both") else z
    t = torch.zeros_like(t) if collapsed in ("target", "both") else t
    loss, dz = reference.losses_and_gradients_reference(z, t, w, metric=metric, isotropic=isotropic)
    assert loss.isfinite().all() and dz.isfinite().all()
    leaf = z.clone().requires_grad_()
    definition = reference.losses_reference(leaf, t, w, metric=metric, isotropic=isotropic)
    torch.testing.assert_close(loss, definition.detach())
    torch.testing.assert_close(dz, torch.autograd.grad(definition.sum(), leaf)[0])
    assert metric == "euclidean" or (loss == 0).all()
    for paper in {False, metric == "cosine"}:
        for gradient in reference.two_sided_gradients_reference(
            z, t, w, metric=metric, paper_gradient=paper
        ):
            assert gradient.dtype == dtype and gradient.isfinite().all()


def test_cosine_is_torchs_cosine_similarity_down_to_the_clamp(make_problem):
    z, _, _, t, w = make_problem(6, 16)
    scale = torch.tensor([1e3, 1, 1e-6, 1e-9, 1e-12, 0], dtype=torch.float64)
    z = z * scale[:, None]
    loss, _ = reference.losses_and_gradients_reference(z, t, w, metric="cosine", isotropic=False)
    expected = -torch.nn.functional.cosine_similarity(z @ w, t, dim=-1, eps=1e-8)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_gradients_in_float32_survive_small_and_large_embeddings(make_problem, scale):
    z, _, _, t, w = make_problem(5, 32, dtype=torch.float32)
    z = z * scale
    kind = {"metric": "cosine", "isotropic": True}
    _, dz = reference.losses_and_gradients_reference(z, t, w, **kind)
    _, exact = reference.losses_and_gradients_reference(z.double(), t.double(), w.double(), **kind)
    torch.testing.assert_close(dz.double(), exact, rtol=1e-4, atol=1e-5 / scale)


@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
def test_symmetries(make_problem, metric, isotropic):
    """Rotating everything rotates the gradient; the cosine ignores the lengths of z and t."""
    z, _, _, t, w = make_problem(9, 33)
    kind = {"metric": metric, "isotropic": isotropic}
    rotation = torch.linalg.qr(torch.randn(33, 33, dtype=torch.float64))[0]
    loss, dz = reference.losses_and_gradients_reference(z, t, w, **kind)
    turned = reference.losses_and_gradients_reference(
        z @ rotation, t @ rotation, rotation.T @ w @ rotation, **kind
    )
    torch.testing.assert_close(turned, (loss, dz @ rotation), rtol=1e-11, atol=1e-12)
    if metric == "cosine":
        scaled = reference.losses_and_gradients_reference(4 * z, 8 * t, w, **kind)
        torch.testing.assert_close(scaled, (loss, dz / 4), rtol=1e-13, atol=0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_leading_dimensions_are_batches_and_broadcast(make_problem, metric):
    problems = [make_problem(7, 5, seed=seed) for seed in range(3)]
    z, t, w = (torch.stack([problem[k] for problem in problems]) for k in (0, 3, 4))

    def all_of(z, t, w):
        for isotropic in (False, True):
            yield from reference.losses_and_gradients_reference(
                z, t, w, metric=metric, isotropic=isotropic
            )
        yield from reference.two_sided_gradients_reference(z, t, w, metric=metric)

    for s in range(3):
        alone = list(all_of(z[s], t[s], w[s]))
        for batches in (all_of(z, t, w), all_of(z[s], t[s], w)):
            for got, expected in zip(batches, alone, strict=True):
                assert len(got) == 3
                torch.testing.assert_close(got[s], expected, rtol=1e-12, atol=1e-14)


def test_correlation_is_the_mean_outer_product_over_all_rows_of_all_views():
    views = [torch.randn(rows, 13, dtype=torch.float64) for rows in (7, 4, 1)]
    corr = torch.randn(13, 13, dtype=torch.float64)
    corr = corr + corr.T
    outer = [torch.outer(row, row) for view in views for row in view]
    expected = 0.9 * corr + 0.1 * sum(outer) / 12
    got = reference.correlation_ema_reference_(corr, views, 0.9)
    assert got is corr and torch.equal(corr, corr.T)
    torch.testing.assert_close(corr, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("normalize", ["spectral", "none"])
@pytest.mark.parametrize("eps", [0.0, 0.25])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0])
def test_matrix_power_is_the_power_of_the_shifted_eigenvalues(alpha, eps, normalize):
    corr = reference.second_moment_reference([torch.randn(9, 20, dtype=torch.float64)])
    w = reference.matrix_power_reference(corr, alpha, eps=eps, normalize=normalize)
    s, u = torch.linalg.eigh(corr)
    s = s.clamp_min(0) / (s.max() if normalize == "spectral" else 1)
    assert torch.equal(w, w.T)
    # rank 9 of 20: an eigenvalue of 1e-16 has a fourth root of 1e-4
    rank_noise = (corr.norm().item() * 20 * EPS) ** min(alpha, 1) if eps == 0 else 1e-12
    expected = u @ torch.diag((s + eps) ** alpha) @ u.T
    torch.testing.assert_close(w, expected, rtol=1e-11, atol=4 * rank_noise)
