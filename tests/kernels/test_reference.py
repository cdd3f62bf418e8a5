"""The specification against the paper's equations, written out here, in float64."""

import pytest
import torch

from isofast_kernels import reference

from .cases import LOSSES

SHAPES = [(37, 129), (1, 16), (8, 5), (3, 1)]
EPS = torch.finfo(torch.float64).eps


def paper_loss(z, target, w, metric, isotropic):
    """One sample, as printed: W^(1/2) is formed, stop-gradients are .detach()."""
    p, t = w @ z, target.detach()
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
    for row in range(rows):
        z_D = z[row].clone().requires_grad_()
        expected = paper_loss(z_D, t[row], w, metric, isotropic)
        (gradient,) = torch.autograd.grad(expected, z_D)
        torch.testing.assert_close(loss[row], expected.detach(), rtol=1e-12, atol=1e-13)
        # iso cosine in one dimension: both terms cancel, so the scale is |t| / (ab), not |dz|
        torch.testing.assert_close(dz[row], gradient, rtol=1e-11, atol=1e-12 / w.norm().item())


@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
def test_definition_and_closed_form_agree(make_problem, metric, isotropic):
    z, _, _, t, w = make_problem(37, 129)
    z.requires_grad_()
    loss = reference.losses_reference(z, t, w, metric=metric, isotropic=isotropic)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    closed_loss, closed_dz = reference.losses_and_gradients_reference(
        z.detach(), t, w, metric=metric, isotropic=isotropic
    )
    torch.testing.assert_close(closed_loss, loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(closed_dz, gradient, rtol=1e-12, atol=1e-14)


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
    if metric == "cosine":
        assert (loss == 0).all()


def test_cosine_is_torchs_cosine_similarity_down_to_the_clamp(make_problem):
    z, _, _, t, w = make_problem(6, 16)
    scale = torch.tensor([1e3, 1, 1e-6, 1e-9, 1e-12, 0], dtype=torch.float64)
    z = z * scale[:, None]
    loss, _ = reference.losses_and_gradients_reference(z, t, w, metric="cosine", isotropic=False)
    expected = -torch.nn.functional.cosine_similarity(z @ w, t, dim=-1, eps=1e-8)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_gradients_in_float32_survive_small_and_large_embeddings(make_problem):
    for scale in (1e-6, 1e-3, 1e3, 1e6):
        z, _, _, t, w = make_problem(5, 32, dtype=torch.float32)
        z = z * scale
        _, dz = reference.losses_and_gradients_reference(z, t, w, metric="cosine", isotropic=True)
        _, exact = reference.losses_and_gradients_reference(
            z.double(), t.double(), w.double(), metric="cosine", isotropic=True
        )
        torch.testing.assert_close(dz.double(), exact, rtol=1e-4, atol=1e-5 / scale)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_plain_gradient_is_w_times_iso_gradient(make_problem, metric):
    z, _, _, t, w = make_problem(37, 129)
    _, plain = reference.losses_and_gradients_reference(z, t, w, metric=metric, isotropic=False)
    _, iso = reference.losses_and_gradients_reference(z, t, w, metric=metric, isotropic=True)
    torch.testing.assert_close(plain, iso @ w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("metric", "isotropic"), LOSSES)
def test_a_rotation_of_everything_rotates_the_gradient_alone(make_problem, metric, isotropic):
    z, _, _, t, w = make_problem(9, 33)
    rotation = torch.linalg.qr(torch.randn(33, 33, dtype=torch.float64))[0]
    loss, dz = reference.losses_and_gradients_reference(z, t, w, metric=metric, isotropic=isotropic)
    turned_loss, turned_dz = reference.losses_and_gradients_reference(
        z @ rotation,
        t @ rotation,
        rotation.T @ w @ rotation,
        metric=metric,
        isotropic=isotropic,
    )
    torch.testing.assert_close(turned_loss, loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(turned_dz, dz @ rotation, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("isotropic", [False, True], ids=["cosine", "iso_cosine"])
def test_scaling_z_and_target_scales_the_cosine_gradient_alone(make_problem, isotropic):
    z, _, _, t, w = make_problem(9, 33)
    loss, dz = reference.losses_and_gradients_reference(
        z, t, w, metric="cosine", isotropic=isotropic
    )
    scaled_loss, scaled_dz = reference.losses_and_gradients_reference(
        4 * z, 8 * t, w, metric="cosine", isotropic=isotropic
    )
    torch.testing.assert_close(scaled_dz, dz / 4, rtol=1e-13, atol=0)
    torch.testing.assert_close(scaled_loss, loss, rtol=1e-13, atol=0)


def test_the_cosine_gradient_is_orthogonal_to_z_and_the_iso_gradient_to_p(make_problem):
    z, _, _, t, w = make_problem(9, 33)
    _, plain = reference.losses_and_gradients_reference(z, t, w, metric="cosine", isotropic=False)
    _, iso = reference.losses_and_gradients_reference(z, t, w, metric="cosine", isotropic=True)
    zero = torch.zeros(9, dtype=torch.float64)
    torch.testing.assert_close((plain * z).sum(-1), zero, rtol=0, atol=1e-13)
    torch.testing.assert_close((iso * (z @ w)).sum(-1), zero, rtol=0, atol=1e-13)


def test_correlation_is_the_mean_outer_product_over_all_rows_of_all_views():
    views = [torch.randn(rows, 13, dtype=torch.float64) for rows in (7, 4, 1)]
    corr = torch.randn(13, 13, dtype=torch.float64)
    corr = corr + corr.T
    outer = [torch.outer(row, row) for view in views for row in view]
    expected = 0.9 * corr + 0.1 * sum(outer) / 12
    got = reference.correlation_ema_reference_(corr, views, 0.9)
    assert got is corr
    torch.testing.assert_close(corr, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_correlation_stays_bitwise_symmetric_and_positive_along_a_stream(dtype):
    corr = torch.zeros(61, 61, dtype=dtype)
    for _ in range(20):
        reference.correlation_ema_reference_(corr, [torch.randn(17, 61, dtype=dtype)], 0.9)
        assert torch.equal(corr, corr.T)
    s = torch.linalg.eigvalsh(corr.double())
    assert s[0] >= -61 * torch.finfo(dtype).eps * s[-1]


def power_by_definition(corr, alpha, eps, normalize):
    s, u = torch.linalg.eigh(corr)
    s = s.clamp_min(0)
    s = s / s.max() if normalize == "spectral" else s
    return u @ torch.diag((s + eps) ** alpha) @ u.T


@pytest.mark.parametrize("normalize", ["spectral", "none"])
@pytest.mark.parametrize("eps", [0.0, 0.25])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0])
def test_matrix_power_is_the_power_of_the_shifted_eigenvalues(alpha, eps, normalize):
    z = torch.randn(9, 20, dtype=torch.float64)
    corr = reference.second_moment_reference([z])
    w = reference.matrix_power_reference(corr, alpha, eps=eps, normalize=normalize)
    expected = power_by_definition(corr, alpha, eps, normalize)
    assert torch.equal(w, w.T)
    # rank 9 of 20: an eigenvalue of 1e-16 has a fourth root of 1e-4
    rank_noise = (corr.norm().item() * 20 * EPS) ** min(alpha, 1) if eps == 0 else 1e-12
    torch.testing.assert_close(w, expected, rtol=1e-11, atol=4 * rank_noise)


def test_squaring_the_root_gives_the_normalised_correlation():
    corr = reference.second_moment_reference([torch.randn(64, 20, dtype=torch.float64)])
    w = reference.matrix_power_reference(corr, 0.5)
    top = torch.linalg.eigvalsh(corr)[-1]
    torch.testing.assert_close(w @ w, corr / top, rtol=1e-11, atol=1e-13)
    assert abs(torch.linalg.eigvalsh(w)[-1].item() - 1) < 1e-12


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_a_zero_correlation_gives_eps_to_the_alpha_times_identity(alpha, eps):
    w = reference.matrix_power_reference(torch.zeros(6, 6), alpha, eps=eps)
    torch.testing.assert_close(w, eps**alpha * torch.eye(6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_non_finite_correlation_gives_nan_and_raises_nothing(alpha, bad):
    corr = torch.eye(6)
    corr[2, 2] = bad
    assert reference.matrix_power_reference(corr, alpha).isnan().all()
