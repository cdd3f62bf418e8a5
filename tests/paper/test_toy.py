"""The toy networks' gradients against their definition, and simulations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from isofast.paper.toy import (
    NOISE,
    Toy,
    correlation,
    embed,
    initial_weights,
    population_gradient,
    randn,
    sampled_gradient,
    simulate,
    stream,
)

from ..kernels.test_reference import paper_loss
from ..support.toys import COSINE, EUCLIDEAN


def test_relu_correlation_is_the_mean_outer_product():
    toy = Toy(relu=True)
    v_SMN = initial_weights(toy)
    rounds = [embed(toy, randn((5000, 15), stream(seed, 9)), v_SMN)[0] for seed in range(40)]
    means = torch.stack([z.T @ z / 5000 for z in rounds])
    error = means.std(0) / 40**0.5
    assert ((means.mean(0) - correlation(toy, v_SMN)[0]).abs() < 5 * error).all()


def test_the_relu_networks_drift_without_predictor_is_the_populations():
    """By quadrature over u = v.x1 of unit variance, with the textbook mean over the noise."""
    u = np.linspace(0, 9, 200_001)
    density = np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi)
    below = np.array([0.5 * (1 + math.erf(x / NOISE / 2**0.5)) for x in u])
    target = u * below + NOISE * np.exp(-((u / NOISE) ** 2) / 2) / np.sqrt(2 * np.pi)
    expected = np.trapezoid((u - target) * u * density, u)
    toy = Toy(predictor=False, relu=True)
    v_SMN = initial_weights(toy)
    found = population_gradient(toy, v_SMN, stream(0, 1))
    torch.testing.assert_close(found, expected * v_SMN, rtol=1e-5, atol=0)
    sampled = sampled_gradient(replace(toy, samples=400_000), v_SMN, stream(0, 1))
    assert (sampled - found).abs().max() < 3e-3


def test_what_the_relu_iso_cosine_leaves_out_does_not_hang_on_the_scale():
    """g is homogeneous of degree -3 in V, since W = V V^T; an absolute bound would break that."""
    toy = Toy(loss="iso_cosine", relu=True, inputs=6, outputs=2)
    v_SMN = initial_weights(toy)
    small, large = (sampled_gradient(toy, v * v_SMN, stream(0, 1)) for v in (0.1, 10.0))
    torch.testing.assert_close(small, 1e6 * large, rtol=1e-9, atol=0)


def test_a_row_of_zeros_is_no_trouble():
    v_SMN = torch.zeros(1, 2, 3, dtype=torch.float64)
    for toy in (Toy(relu=True), Toy(loss="cosine", relu=True), Toy(loss="cosine")):
        sizes = replace(toy, inputs=3, outputs=2, steps=3, samples=10)
        assert (simulate(sizes, v_SMN).eigenvalues == 0).all()


@pytest.mark.parametrize("name", COSINE)
@pytest.mark.parametrize("short_side", ["prediction", "target"])
def test_a_relu_sample_with_one_side_below_the_norm_floor_moves_nothing(short_side, name):
    """V maps the only pair of views to embeddings of length 1 and 1e-12.

    The short one would otherwise move V by 1e8, along itself.
    """
    toy = replace(COSINE[name], relu=True, samples=1, inputs=2, outputs=2)
    generator = stream(0, 1)
    x1_N = randn((1, 2), generator)[0]
    views_NV = torch.stack([x1_N, x1_N + NOISE * randn((1, 2), generator)[0]], 1)
    scales_V = torch.tensor([1e-12, 1.0] if short_side == "prediction" else [1.0, 1e-12])
    embeddings_MV = torch.tensor([[0.6, 0.8], [0.8, 0.6]], dtype=torch.float64) * scales_V
    v_SMN = (embeddings_MV @ views_NV.inverse())[None]
    lengths_V = embed(toy, views_NV.T, v_SMN)[0].norm(dim=-1)
    torch.testing.assert_close(lengths_V, scales_V.double(), rtol=1e-2, atol=0)
    assert (sampled_gradient(toy, v_SMN, stream(0, 1)) == 0).all()
    both = v_SMN.new_tensor([[[0.6, 0.8], [0.8, 0.6]]]) @ views_NV.inverse()
    assert sampled_gradient(toy, both, stream(0, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("name", EUCLIDEAN)
def test_the_closed_form_is_the_mean_of_the_samples(name):
    toy = replace(EUCLIDEAN[name], samples=4000)
    v_SMN = initial_weights(toy)
    generator = stream(0, 1)
    rounds = torch.stack([sampled_gradient(toy, v_SMN, generator)[0] for _ in range(60)])
    error = rounds.std(0) / 60**0.5
    exact = population_gradient(toy, v_SMN, generator)[0]
    assert ((rounds.mean(0) - exact).abs() < 5 * error).all()
    assert error.max() < 0.02, "otherwise the bound holds whatever the closed form is"


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize(
    "toy",
    [
        pytest.param(toy, id=name)
        for name, toy in {**EUCLIDEAN, **COSINE}.items()
        # the paper's form is not a derivative of anything
        if not toy.paper_gradient
    ],
)
def test_the_sampled_gradient_is_autograds_with_the_predictor_held(toy, relu):
    toy = replace(toy, relu=relu, samples=50)
    found = sampled_gradient(toy, initial_weights(toy), stream(3, 1))[0]
    generator = stream(3, 1)
    x1 = randn((50, 15), generator)
    x2 = x1 + NOISE * randn((50, 15), generator)
    v = initial_weights(toy)[0].requires_grad_()
    z, t = (torch.relu(x @ v.T) if relu else x @ v.T for x in (x1, x2))
    w = (v @ v.T).detach() if toy.predictor else torch.eye(10, dtype=torch.float64)
    t = t.detach() if toy.stop_gradient else t
    kind = toy.loss.removeprefix("iso_"), toy.loss.startswith("iso_")
    losses = [paper_loss(z_M, t_M, w, *kind) for z_M, t_M in zip(z, t, strict=True)]
    (expected,) = torch.autograd.grad(sum(losses) / 50, v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_seed_gives_one_result_and_another_seed_another():
    toy = Toy(loss="cosine", steps=30, samples=50)
    other = replace(toy, seed=1)
    first, again, elsewhere = (simulate(one).eigenvalues for one in (toy, toy, other))
    assert np.array_equal(first, again)
    assert not np.allclose(first[0], elsewhere[0])
    drawn = simulate(other, initial_weights(toy)).eigenvalues
    assert np.array_equal(drawn[0], first[0])
    assert not np.array_equal(drawn[1], first[1]), "the samples depend on the seed too"


def test_no_two_streams_have_anything_to_do_with_each_other():
    """Over 10,000 numbers each, where a chance correlation is 0.01."""
    places = [(seed, index) for seed in range(3) for index in range(4)]
    drawn = np.stack([randn((10_000,), stream(*place)).numpy() for place in places])
    assert np.abs(np.corrcoef(drawn) - np.eye(len(places))).max() < 0.06
    for place, numbers in zip(places, drawn, strict=True):
        assert np.array_equal(randn((10_000,), stream(*place)).numpy(), numbers)


def test_records_are_spread_from_the_first_step_to_the_last():
    toy = Toy(steps=10)
    assert simulate(toy, records=3).steps.tolist() == [0, 5, 10]
    track = simulate(toy, records=100)
    assert track.steps.tolist() == list(range(11)) and track.eigenvalues.shape == (11, 1, 10)
    assert (np.diff(track.eigenvalues, axis=-1) <= 0).all()
    none = simulate(replace(toy, steps=0), records=5)
    assert none.steps.tolist() == [0]
