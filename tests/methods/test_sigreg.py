"""SIGReg against the integral written with complex numbers, in float64; its directions; a run."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from isofast.config.load import validate
from isofast.config.schema import Config, ProjectorConfig
from isofast.errors import UserError
from isofast.methods import Views
from isofast.methods.sigreg import SIGReg, _mix, directions, normality
from isofast.run.metrics import read_metrics

from ..support.runs import fit_apart


def _method(dim: int = 6, **settings: Any) -> SIGReg:
    torch.manual_seed(3)
    return SIGReg(
        SIGReg.Config(name="sigreg", directions=12, **settings), ProjectorConfig(output=dim)
    )


def _expected(z_VBD: torch.Tensor, a_AD: torch.Tensor, weight: float, knots: int) -> torch.Tensor:
    """The loss with complex numbers, one view and direction at a time, over the whole interval."""
    t = torch.linspace(-3, 3, 2 * knots - 1, dtype=torch.float64)
    tests = []
    for z_BD in z_VBD:
        for a_D in a_AD:
            empirical = torch.exp(1j * torch.outer(t, (z_BD * a_D).sum(1))).mean(1)
            gap = (empirical - torch.exp(-(t**2) / 2)).abs() ** 2
            tests.append(len(z_BD) * torch.trapezoid(gap * torch.exp(-(t**2) / 2), t))
    z1_BD, z2_BD = z_VBD
    # each of two views is half their difference away from the mean
    prediction = ((z1_BD - z2_BD) / 2).pow(2).mean()
    return (1 - weight) * prediction + weight * sum(tests) / len(tests)


@pytest.mark.parametrize("weight", [0.0, 0.05, 1.0])
def test_loss_and_gradient_are_the_integrals(weight):
    method = _method(weight=weight)
    z_VBD = 1.5 * torch.randn(2, 20, 6) + 0.3
    ours = z_VBD.clone().requires_grad_()
    theirs = z_VBD.double().requires_grad_()
    a_AD = directions(method.seed, method.step, 12, 6).double()
    loss = method.loss(Views(*ours, *ours.detach()))
    expected = _expected(theirs, a_AD, weight, method.config.knots)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)
    scalars = {name: value.item() for name, value in method.scalars().items()}
    total = (1 - weight) * scalars["prediction_loss"] + weight * scalars["sigreg"]
    assert total == pytest.approx(loss.item(), rel=1e-5)
    cosines = torch.cosine_similarity(*z_VBD, dim=1)
    assert scalars["alignment"] == pytest.approx(cosines.mean().item(), rel=1e-5)


def test_the_knots_are_enough():
    """Against the integral by adaptive quadrature, the gradient against finite differences."""
    method = _method()
    x = np.random.default_rng(0).standard_t(3, size=40)

    def gap(t: float) -> float:
        return float(abs(np.exp(1j * t * x).mean() - np.exp(-t * t / 2)) ** 2 * np.exp(-t * t / 2))

    z_VBD = torch.tensor(x).view(1, -1, 1).requires_grad_()
    a_AD, t_K, w_K = torch.ones(1, 1).double(), method.t_K.double(), method.w_K.double()
    found = normality(z_VBD, a_AD, t_K, w_K)
    assert found.item() == pytest.approx(len(x) * integrate.quad(gap, -3, 3)[0], rel=1e-3)
    assert torch.autograd.gradcheck(lambda z: normality(z, a_AD, t_K, w_K), z_VBD)


@pytest.mark.parametrize("rows", [8, 256])
def test_a_normal_has_the_expected_value(rows):
    """E |mean exp(i t x) - exp(-t^2/2)|^2 = (1 - exp(-t^2)) / N, whatever the directions."""
    method = _method(dim=16)
    torch.manual_seed(0)
    a_AD = directions(method.seed, method.step, 12, 16)
    values = [normality(torch.randn(2, rows, 16), a_AD, method.t_K, method.w_K) for _ in range(200)]
    expected, _ = integrate.quad(lambda t: (1 - np.exp(-t * t)) * np.exp(-t * t / 2), -3, 3)
    assert torch.stack(values).mean().item() == pytest.approx(expected, rel=0.05)
    collapsed = normality(torch.zeros(2, rows, 16), a_AD, method.t_K, method.w_K)
    assert collapsed.item() > 0.2 * rows


def test_directions_are_uniform_and_a_function_of_seed_and_step():
    seed, step = torch.tensor(11), torch.tensor(5)
    a_AD = directions(seed, step, 20_000, 3)
    torch.testing.assert_close(a_AD.norm(dim=1), torch.ones(20_000))
    # Archimedes: on the sphere in three dimensions each coordinate is uniform
    for coordinate in a_AD.double().numpy().T:
        assert stats.kstest(coordinate, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    following_AD = directions(seed, step + 1, 20_000, 3)
    for other_AD in (following_AD, directions(seed + 1, step + 7, 20_000, 3), a_AD.roll(1, 0)):
        # 6 standard deviations
        assert (a_AD * other_AD).sum(1).mean().abs() < 6 / (3 * 20_000) ** 0.5
    assert torch.equal(directions(seed, step, 20_000, 3), a_AD)


def test_the_hash_is_splitmix64():
    # first outputs of the published generator at seed 0
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(x) % 2**64 for x in _mix(torch.arange(1, 4))] == published


def test_each_step_has_its_directions_and_a_resumed_one_too():
    z_VBD = torch.randn(2, 20, 6)
    views = Views(*z_VBD, *z_VBD)
    whole, first = _method(), _method()
    values = [whole.loss(views) for _ in range(4)]
    assert len({*map(float, values)}) == 4
    assert [first.loss(views) for _ in range(2)] == values[:2]
    torch.rand(7)
    second = SIGReg(first.config, ProjectorConfig(output=6))
    second.load_state_dict(first.state_dict())
    assert [second.loss(views) for _ in range(2)] == values[2:]


@pytest.mark.slow
def test_it_trains(tmp_path, small):
    settings = small(method={"name": "sigreg"}, train={"max_steps": 40, "epochs": 10})
    # the rest comes from the preset
    settings["optimizer"] = {"lr": 0.008}
    config: Config = validate(settings)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.weight_decay) == ("adamw", 0.05)
    assert not config.method.ema and config.method.correlation == "embeddings"
    with pytest.raises(UserError, match=r"method\.ema: got True"):
        validate(small(method={"name": "sigreg", "ema": True}))
    fit_apart(settings, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert records[-1]["effective_rank"] > records[0]["effective_rank"]
