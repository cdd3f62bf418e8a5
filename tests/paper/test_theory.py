"""The paper's theorems about its toy networks, on the simulations that draw its figures."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from isofast.paper.toy import NOISE, Toy, initial_weights, population_gradient, simulate, stream

from ..support.toys import COSINE, EUCLIDEAN

pytestmark = pytest.mark.slow

Array = NDArray[np.float64]

# lambda' / eta of a mode under V' = -eta dV
RATES: dict[str, Callable[[Array], Array]] = {
    "euclidean": lambda x: 2 * x**2 * (1 - x),
    "iso_euclidean": lambda x: 2 * x * (1 - x),
    "euclidean_no_stop_gradient": lambda x: -2 * x * ((1 - x) ** 2 + NOISE**2),
    "euclidean_no_predictor": lambda x: 0 * x,
}


def diagonal_weights(eigenvalues: list[float], inputs: int) -> Tensor:
    """V (1, M, N) whose V V^T has these eigenvalues."""
    roots = torch.tensor(eigenvalues, dtype=torch.float64).sqrt()
    return torch.cat([torch.diag(roots), torch.zeros(len(roots), inputs - len(roots))], 1)[None]


def spectra(toy: Toy, records: int = 2) -> Array:
    """The eigenvalues (T, M) of one initialisation."""
    return simulate(toy, records=records).eigenvalues[:, 0]


def rates_of_modes(toy: Toy, v_SMN: Tensor) -> Array:
    """lambda' / eta of each mode of V V^T, largest mode first, at V."""
    dv_MN = population_gradient(toy, v_SMN, stream(0, 1))[0]
    _, basis = torch.linalg.eigh(v_SMN[0] @ v_SMN[0].T)
    return -2 * (basis.T @ dv_MN @ v_SMN[0].T @ basis).diagonal().flip(0).numpy()


@pytest.mark.parametrize("name", EUCLIDEAN)
def test_a_euclidean_mode_follows_its_equation_to_the_end(name):
    """The solution of lambda' against gradient descent on V, whose own error is of order lr."""
    lr, steps = 1e-3, 4000
    found = spectra(replace(EUCLIDEAN[name], steps=steps, lr=lr), records=5)
    times = lr * np.linspace(0, steps, 5)
    rate, precise = RATES[name], {"rtol": 1e-8, "atol": 1e-14}
    modes = solve_ivp(lambda _, mode: rate(mode), times[[0, -1]], found[0], t_eval=times, **precise)
    np.testing.assert_allclose(found, modes.y.T, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize(("name", "power"), [("euclidean", 1), ("iso_euclidean", 0)])
def test_an_embedding_moves_at_the_papers_rate(name, power):
    """z' = eta lambda (1 - lambda) z, IsoLoss eta (1 - lambda) z: half lambda's relative rate."""
    values, lr = [1.6, 0.7, 0.02], 1e-7
    toy = replace(EUCLIDEAN[name], inputs=5, outputs=3, steps=1, lr=lr)
    points = torch.ones(1, 5, dtype=torch.float64)
    track = simulate(toy, diagonal_weights(values, 5), points_PN=points)
    z, after = track.points[:, 0, 0]
    modes = np.array(values)
    np.testing.assert_allclose((after - z) / lr / z, modes**power * (1 - modes), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "steps", "low", "high"),
    [("cosine", 2500, 0.996, 1.004), ("iso_cosine", 1500, 1.1, 1.5)],
)
def test_cosine_equalises_at_the_trace_it_started_with_and_iso_loss_at_a_larger_one(
    name, steps, low, high
):
    start, end = spectra(replace(COSINE[name], steps=steps, samples=400))
    assert low < end.sum() / start.sum() < high
    np.testing.assert_allclose(end, end.mean(), rtol=5e-3)


def test_iso_cosine_recruits_small_modes_at_homogeneous_rates():
    """Relative rates of the modes below half the mean (0.33, 0.084, 0.043), slowest over fastest.

    0.75 for IsoLoss and 0.18 for the plain loss, which multiplies each by its eigenvalue.
    """
    v_SMN = initial_weights(Toy())
    values = torch.linalg.eigvalsh(v_SMN[0] @ v_SMN[0].T).flip(0).numpy()
    small = values < values.mean() / 2
    assert small.sum() == 3
    iso, plain = (
        rates_of_modes(replace(COSINE[name], samples=100_000), v_SMN)
        for name in ("iso_cosine", "cosine")
    )
    np.testing.assert_allclose(plain, values * iso, rtol=1e-9, atol=1e-12)
    relative_iso, relative_plain = (iso / values)[small], (plain / values)[small]
    assert relative_iso.min() / relative_iso.max() == pytest.approx(0.75, abs=0.05)
    assert relative_plain.min() / relative_plain.max() == pytest.approx(0.18, abs=0.03)


@pytest.mark.parametrize("name", COSINE)
def test_whether_a_cosine_gradient_leaves_the_trace_alone(name):
    """Exactly, on any samples, if it is a true gradient: the loss ignores lengths."""
    change = rates_of_modes(COSINE[name], initial_weights(Toy())).sum()
    if name in ("iso_cosine", "cosine_paper_gradient"):
        assert change > 0.1
    else:
        assert abs(change) < 1e-12


def test_cosine_without_predictor_keeps_the_trace_and_narrows_slowly():
    start, end = spectra(replace(COSINE["cosine_no_predictor"], steps=1500))
    assert end.sum() == pytest.approx(start.sum(), rel=1e-3)
    assert 0.95 * start[0] < end[0] < 0.99 * start[0]
    assert 1.05 * start[-1] < end[-1] < 2 * start[-1]


def test_cosine_without_stop_gradient_collapses_dimensions_and_the_papers_form_diverges():
    start, true = spectra(replace(COSINE["cosine_no_stop_gradient"], samples=400))
    assert true.sum() == pytest.approx(start.sum(), rel=1e-2)
    assert np.median(true) < 1e-3 and true[0] > 1.2 * start[0]
    paper = spectra(replace(COSINE["cosine_paper_gradient"], samples=400))[-1]
    assert paper.sum() > 20 * start.sum()


def test_relu_networks_keep_their_dimensions_and_lose_them_without_stop_gradient():
    kept = spectra(Toy(loss="iso_euclidean", relu=True, samples=200))
    assert kept[-1].min() > 3 * kept[0].min()
    lost = spectra(Toy(loss="euclidean", stop_gradient=False, relu=True, samples=200))
    assert lost[-1].sum() < 0.02 * lost[0].sum()


def test_the_relu_iso_cosine_of_two_outputs_ends_alike_on_any_samples():
    """From one V, the final trace agrees to 2 % over four draws of the samples.

    The mean gradient exists only thanks to the bound on lengths: without it single samples decide.
    """
    toy = Toy(loss="iso_cosine", relu=True, inputs=6, outputs=2, lr=0.01, samples=500)
    start = initial_weights(toy)
    ends = [
        simulate(replace(toy, seed=seed), start).weight_eigenvalues[-1, 0].sum()
        for seed in range(4)
    ]
    np.testing.assert_allclose(ends, np.mean(ends), rtol=0.02)
    assert start.square().sum() < min(ends) < 1.2 * start.square().sum()
