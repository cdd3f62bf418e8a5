"""The losses without stop-gradient against autograd of their definitions, in float64."""

import pytest
import torch

from isofast_kernels.reference import (
    losses_and_gradients_reference,
    two_sided_gradients_reference,
)

SHAPES = [(37, 129), (1, 16), (8, 5), (3, 1)]


def euclidean_loss(z, t, w):
    return 0.5 * (z @ w - t).pow(2).sum()


def cosine_loss(z, t, w):
    return -torch.nn.functional.cosine_similarity(z @ w, t, dim=-1).sum()


DEFINITIONS = [
    pytest.param("euclidean", euclidean_loss, id="euclidean"),
    pytest.param("cosine", cosine_loss, id="cosine"),
]


def autograd_of_both(definition, z, t, w):
    z, t = z.clone().requires_grad_(), t.clone().requires_grad_()
    return torch.autograd.grad(definition(z, t, w), (z, t))


@pytest.mark.parametrize("predictor", [True, False], ids=["predictor", "no_predictor"])
@pytest.mark.parametrize(("metric", "definition"), DEFINITIONS)
@pytest.mark.parametrize(("rows", "features"), SHAPES)
def test_both_gradients_are_the_derivatives(
    make_problem, rows, features, metric, definition, predictor
):
    z, _, _, t, w = make_problem(rows, features)
    w = w if predictor else torch.eye(features, dtype=torch.float64)
    dz, dt = two_sided_gradients_reference(z, t, w, metric=metric)
    expected_dz, expected_dt = autograd_of_both(definition, z, t, w)
    # in one dimension the cosine is constant and both of its terms cancel
    torch.testing.assert_close(dz, expected_dz, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(dt, expected_dt, rtol=1e-11, atol=1e-12)


def test_the_papers_form_differs_in_the_stated_term_alone(make_problem):
    z, _, _, t, w = make_problem(37, 129)
    dz, dt = two_sided_gradients_reference(z, t, w, metric="cosine", paper_gradient=True)
    true_dz, true_dt = autograd_of_both(cosine_loss, z, t, w)
    p = z @ w
    a, b = p.norm(dim=-1, keepdim=True), t.norm(dim=-1, keepdim=True)
    d = (p * t).sum(-1, keepdim=True)
    difference = d * t / (a**3 * b) - d * t / (a * b**3)
    assert difference.norm() > true_dt.norm(), "the case must tell the two forms apart"
    torch.testing.assert_close(dz, true_dz, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(dt - true_dt, difference, rtol=1e-10, atol=1e-12)


def test_the_papers_form_is_the_derivative_where_both_norms_are_one(make_problem):
    z, _, _, t, _ = make_problem(9, 33)
    z, t = (torch.nn.functional.normalize(x, dim=-1) for x in (z, t))
    identity = torch.eye(33, dtype=torch.float64)
    _, paper = two_sided_gradients_reference(z, t, identity, metric="cosine", paper_gradient=True)
    _, true = two_sided_gradients_reference(z, t, identity, metric="cosine")
    torch.testing.assert_close(paper, true, rtol=1e-12, atol=1e-14)


def test_the_true_cosine_gradients_are_orthogonal_to_what_they_move(make_problem):
    z, _, _, t, w = make_problem(9, 33)
    dz, dt = two_sided_gradients_reference(z, t, w, metric="cosine")
    zero = torch.zeros(9, dtype=torch.float64)
    torch.testing.assert_close((dz * z).sum(-1), zero, rtol=0, atol=1e-13)
    torch.testing.assert_close((dt * t).sum(-1), zero, rtol=0, atol=1e-13)
    _, paper = two_sided_gradients_reference(z, t, w, metric="cosine", paper_gradient=True)
    assert (paper * t).sum(-1).abs().min() > 1e-3


def test_the_paper_has_no_other_form_of_the_euclidean_gradient(make_problem):
    z, _, _, t, w = make_problem(3, 5)
    with pytest.raises(ValueError, match="for metric 'cosine'"):
        two_sided_gradients_reference(z, t, w, metric="euclidean", paper_gradient=True)


@pytest.mark.parametrize("collapsed", ["z", "target", "both"])
@pytest.mark.parametrize("paper_gradient", [False, True], ids=["true", "paper"])
def test_a_collapsed_batch_gives_finite_gradients(make_problem, collapsed, paper_gradient):
    z, _, _, t, w = make_problem(4, 16, dtype=torch.float32)
    z = torch.zeros_like(z) if collapsed in ("z", "both") else z
    t = torch.zeros_like(t) if collapsed in ("target", "both") else t
    for gradient in two_sided_gradients_reference(
        z, t, w, metric="cosine", paper_gradient=paper_gradient
    ):
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_initialisations_at_once_equal_one_by_one(make_problem, metric):
    problems = [make_problem(7, 5, seed=seed) for seed in range(3)]
    z, t, w = (torch.stack([problem[k] for problem in problems]) for k in (0, 3, 4))
    dz, dt = two_sided_gradients_reference(z, t, w, metric=metric)
    for isotropic in (False, True):
        loss, one_sided = losses_and_gradients_reference(
            z, t, w, metric=metric, isotropic=isotropic
        )
        assert loss.shape == (3, 7) and one_sided.shape == (3, 7, 5)
        for s in range(3):
            alone = losses_and_gradients_reference(
                z[s], t[s], w[s], metric=metric, isotropic=isotropic
            )
            torch.testing.assert_close((loss[s], one_sided[s]), alone, rtol=1e-12, atol=1e-14)
    for s in range(3):
        alone = two_sided_gradients_reference(z[s], t[s], w[s], metric=metric)
        torch.testing.assert_close((dz[s], dt[s]), alone, rtol=1e-12, atol=1e-14)


def test_one_batch_broadcasts_over_many_predictors(make_problem):
    z, _, _, t, w = make_problem(7, 5)
    stack = torch.stack([w, 2 * w])
    dz, dt = two_sided_gradients_reference(z, t, stack, metric="euclidean")
    assert dz.shape == dt.shape == (2, 7, 5)
    alone = two_sided_gradients_reference(z, t, 2 * w, metric="euclidean")
    torch.testing.assert_close((dz[1], dt[1]), alone, rtol=1e-12, atol=1e-14)
