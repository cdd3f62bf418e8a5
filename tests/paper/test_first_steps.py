"""The closed form in docs/method/first-steps.md: a few long embeddings in C."""

import math

import pytest
import torch
from torch.nn import functional

from isofast_kernels import asymmetric_loss, matrix_power, second_moment

FEW, MANY, LONG = 16, 240, 13.0


@pytest.fixture
def z_BD() -> torch.Tensor:
    """A sixteenth of the embeddings along e1, 13 times as long as the rest, along e2."""
    z_BD = torch.zeros(FEW + MANY, 8)
    z_BD[:FEW, 0] = LONG
    z_BD[FEW:, 1] = 1.0
    return z_BD


def test_long_embeddings_own_c_and_shorten_the_others(z_BD):
    w_DD = matrix_power(second_moment(z_BD), 0.5)
    short = math.sqrt(MANY / FEW) / LONG
    norms_B = (z_BD @ w_DD).norm(dim=1) / z_BD.norm(dim=1)
    assert norms_B[0].item() == pytest.approx(1, abs=1e-3)
    assert norms_B[-1].item() == pytest.approx(short, abs=1e-3)

    # at perfect alignment the isotropic loss is -|z| / 2|Wz|, or -1/2 where W does not shorten
    rest_BD = z_BD[FEW:]
    value = asymmetric_loss(rest_BD, rest_BD, w_DD).item()
    assert value == pytest.approx(-1 / (2 * short), rel=1e-3)


def test_in_c_of_directions_every_image_counts_the_same(z_BD):
    w_DD = matrix_power(second_moment(functional.normalize(z_BD, dim=1)), 0.5)
    norms_B = (z_BD @ w_DD).norm(dim=1) / z_BD.norm(dim=1)
    assert norms_B[0].item() == pytest.approx(math.sqrt(FEW / MANY), abs=1e-3)
    assert norms_B[-1].item() == pytest.approx(1, abs=1e-3)


def test_the_isotropic_gradient_goes_with_the_inverse_of_the_prediction():
    """|z| |g| = sin(p, t) |z| / |p| for each image."""
    torch.manual_seed(0)
    z_BD, t_BD = torch.randn(2, 32, 8, dtype=torch.float64)
    z_BD.requires_grad_()
    w_DD = matrix_power(second_moment(torch.randn(64, 8)), 0.5).double()
    asymmetric_loss(z_BD, t_BD, w_DD).backward()
    p_BD = (z_BD @ w_DD).detach()
    cos_B = torch.cosine_similarity(p_BD, t_BD, dim=1)
    expected_B = (1 - cos_B.square()).sqrt() / p_BD.norm(dim=1)
    torch.testing.assert_close(len(z_BD) * z_BD.grad.norm(dim=1), expected_B)
