"""The matrix power algorithm against float64, with products in fp32 and of fp16 halves."""

import functools
import runpy
from pathlib import Path

import pytest
import torch

from isofast_kernels import reference
from isofast_kernels.matrix_power import (
    BOUND_SQUARINGS,
    SHIFTED_EPS,
    SHIFTED_FLOOR,
    SHIFTED_STEPS,
    SQUARINGS,
    UNSHIFTED_FLOOR,
    UNSHIFTED_STEPS,
    power_by_products,
)

from .emulation import TorchSteps, product_of_halves, product_on_tensor_cores

BUDGET = 5e-4
"""Spectral norm of W's error where |W| = 1; below bf16's rounding of z by a factor of eight."""

MINIMAX = runpy.run_path(str(Path(__file__).resolve().parents[2] / "bench" / "minimax.py"))
FEATURES = 256
PRODUCTS = [pytest.param(torch.matmul, id="fp32"), pytest.param(product_of_halves, id="halves")]


PLACE = torch.arange(FEATURES, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones_like(PLACE),
    "power_law": 1 / (1 + PLACE),
    "to_1e-6": 10 ** (-6 * PLACE / (FEATURES - 1)),
    "rank_16": torch.where(PLACE < 16, 1 - PLACE / 32, 0.0),
    "tail_1e-8": torch.where(PLACE < 32, 1 - PLACE / 40, 1e-8),
    "one_direction": torch.where(PLACE < 1, 1.0, 1e-7),
    "repeated": 2.0 ** -(PLACE // 32),
    "band_at_the_floor": torch.where(PLACE < 4, 1.0, 3e-6),
    # the bound is nearly D^(1/8) times the largest eigenvalue
    "flat_to_the_floor": torch.where(PLACE < 240, 1.0, 6e-7),
}


@functools.cache
def correlation(kind):
    """Return a random C with this spectrum, up to a factor, rounded to fp32."""
    return rotated(7.3 * SPECTRA[kind])


def rotated(values):
    """Return a random symmetric matrix with these eigenvalues, rounded to fp32."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    return reference.mirror_lower((basis * values) @ basis.T).float()


def spectral_error(w, corr, alpha, eps, normalize="spectral"):
    """Against float64, relative to |W|."""
    exact = reference.matrix_power_reference(corr.double(), alpha, eps=eps, normalize=normalize)
    scale = torch.linalg.matrix_norm(exact, 2)
    return (torch.linalg.matrix_norm(w.double() - exact, 2) / scale).item()


def root(corr, matmul=torch.matmul):
    return power_by_products(corr, 0.5, 0.0, "spectral", TorchSteps(corr, matmul))


# spectrum, alpha, eps, normalize, products, bound
TOP = SQUARINGS + 1
POWERS = [
    *((kind, 0.5, 0.0, "spectral", TOP + 21, BUDGET) for kind in SPECTRA),
    *(
        (kind, alpha, eps, "spectral", products, 1e-5)
        for kind in ("power_law", "rank_16", "one_direction")
        for eps in (0.1, 0.25, 1.0)
        for alpha, products in ((0.25, TOP + 18), (0.5, TOP + 9), (1.0, TOP), (2.0, TOP + 1))
    ),
    *(
        ("to_1e-6", alpha, eps, "none", products, BUDGET)
        for eps in (0.0, 1e-3, 0.3)
        for alpha, products in ((0.5, BOUND_SQUARINGS + 21), (2.0, BOUND_SQUARINGS + 1))
    ),
]


@pytest.mark.parametrize("matmul", PRODUCTS)
@pytest.mark.parametrize(("kind", "alpha", "eps", "normalize", "products", "bound"), POWERS)
def test_powers(kind, alpha, eps, normalize, products, bound, matmul):
    corr = correlation(kind)
    steps = TorchSteps(corr, matmul)
    w = power_by_products(corr, alpha, eps, normalize, steps)
    assert torch.equal(w, w.T)
    assert steps.products == products
    assert spectral_error(w, corr, alpha, eps, normalize) <= bound


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.0999, 0.1])
@pytest.mark.parametrize("kind", ["rank_16", "one_direction"])
def test_three_steps_are_taken_from_where_they_are_enough(kind, eps):
    corr = correlation(kind)
    w = power_by_products(corr, 0.5, eps, "spectral", TorchSteps(corr, product_of_halves))
    assert spectral_error(w, corr, 0.5, eps) <= BUDGET
    # the bound is at most D^(1/2048) times lambda_max, which itself is at most 0.2 % low
    assert SHIFTED_FLOOR <= SHIFTED_EPS / (1.15 + SHIFTED_EPS)


@pytest.mark.parametrize("matmul", PRODUCTS)
@pytest.mark.parametrize(("decay", "rows"), [(0.998, 256), (0.998, 32), (0.5, 256), (0.5, 32)])
def test_along_a_stream(decay, rows, matmul):
    """C from zero, as in training, on embeddings with a rotating basis and a spectrum to 1e-8."""
    generator = torch.Generator().manual_seed(1)
    slope = 10 ** (-4 * torch.arange(FEATURES) / FEATURES)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator) / FEATURES**0.5
    corr = torch.zeros(FEATURES, FEATURES)
    worst = 0.0
    for step in range(60):
        mixing += 0.01 * torch.randn(FEATURES, FEATURES, generator=generator) / FEATURES**0.5
        z = torch.randn(rows, FEATURES, generator=generator) * slope @ mixing
        reference.correlation_ema_reference_(corr, [z], decay)
        if step in (0, 1, 10, 59):
            worst = max(worst, spectral_error(root(corr, matmul), corr, 0.5, 0.0))
    assert worst <= BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("rows", [512, 1024])
def test_along_an_isotropic_stream(rows):
    """Where IsoLoss drives C: a nearly flat spectrum with eigenvalues crowded at its edge."""
    generator = torch.Generator().manual_seed(3)
    corr = torch.zeros(FEATURES, FEATURES)
    for _ in range(1200):
        z = torch.randn(rows, FEATURES, generator=generator)
        reference.correlation_ema_reference_(corr, [z], 0.998)
    for alpha, eps in ((0.5, 0.0), (1.0, 0.25), (1.0, 0.0)):
        w = power_by_products(corr, alpha, eps, "spectral", TorchSteps(corr, product_of_halves))
        assert spectral_error(w, corr, alpha, eps) <= BUDGET


@pytest.mark.slow
def test_tensor_cores_cost_less_where_the_sums_of_highs_begin_anew():
    corr = correlation("tail_1e-8")
    chained = functools.partial(product_on_tensor_cores, restart=FEATURES)
    errors = [
        spectral_error(root(corr, product), corr, 0.5, 0.0)
        for product in (product_of_halves, product_on_tensor_cores, chained)
    ]
    assert errors[1] < 1.1 * errors[0] < errors[2]


def test_the_squares_of_a_flat_spectrum_stay_where_fp16_is_normal():
    """With 1,024 features; without scaling the result would be off by 6e-4."""
    z = torch.randn(8192, 1024, generator=torch.Generator().manual_seed(0))
    corr = reference.second_moment_reference([z])
    steps = TorchSteps(corr, product_of_halves)
    w = power_by_products(corr, 1.0, 0.0, "spectral", steps)
    assert spectral_error(w, corr, 1.0, 0.0) <= 1e-5


@pytest.mark.parametrize("matmul", PRODUCTS)
@pytest.mark.parametrize("kind", ["power_law", "rank_16", "one_direction"])
def test_on_the_way_to_zero_c_has_its_root_or_counts_as_zero(kind, matmul):
    """At no scale is W anything in between."""
    wide = correlation(kind)
    exact = reference.matrix_power_reference(wide[:64, :64].double(), 0.5).float()
    for exponent in range(-46, 1):
        corr = wide[:64, :64] * (10.0**exponent)
        w = root(corr, matmul)
        dead = exponent < -24 and (w == 0).all()
        assert dead or torch.linalg.matrix_norm(w - exact, 2) <= BUDGET


@pytest.mark.parametrize("matmul", PRODUCTS)
def test_where_the_bound_lives_and_the_largest_eigenvalue_counts_as_zero(matmul):
    for scale in (0.5e-25, 0.8e-25, 0.99e-25):
        assert (root(scale * torch.eye(64), matmul) == 0).all()


def test_noise_below_zero_does_no_harm():
    """fp32 leaves eigenvalues of C at -1e-7 of the largest; the iteration must not amplify them."""
    values = torch.linspace(1, 0.5, 64, dtype=torch.float64)
    values[40:] = -3e-7
    corr = rotated(values)
    assert spectral_error(root(corr), corr, 0.5, 0.0) <= BUDGET


def test_the_largest_eigenvalue_of_a_tight_cluster_is_off_by_less_than_documented():
    """255 eigenvalues at 0.998 are the worst case for a 2,048th power: W is 0.08 % too large."""
    values = torch.full((FEATURES,), 0.998)
    values[0] = 1
    corr = torch.diag(values)
    assert 7.5e-4 < spectral_error(root(corr), corr, 0.5, 0.0) < 8.5e-4


@pytest.mark.parametrize(
    ("table", "floor"),
    [
        pytest.param(UNSHIFTED_STEPS, UNSHIFTED_FLOOR, id="unshifted"),
        pytest.param(SHIFTED_STEPS, SHIFTED_FLOOR, id="shifted"),
    ],
)
def test_the_coefficients_are_the_minimax_ones(table, floor):
    computed, deviation = MINIMAX["minimax_steps"](floor, len(table))
    torch.testing.assert_close(torch.tensor(table), torch.tensor(computed), rtol=0, atol=2e-7)
    # what they are for: every x in [sqrt(floor), 1] ends within the deviation of 1
    x = torch.linspace(floor**0.5, 1, 100_001, dtype=torch.float64)
    for a, b, c in table:
        x = x * (a + b * x**2 + c * x**4)
    assert (x - 1).abs().max() <= deviation + 1e-7
    assert deviation < 1e-7
