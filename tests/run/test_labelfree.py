"""Each metric against its definition in numpy, known values and invariances."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from isofast.run.labelfree import alignment, alpha_req, label_free, lidar, rankme, uniformity
from isofast.run.spectrum import Spectrum

Array = npt.NDArray[np.float64]
SHAPES = pytest.mark.parametrize("shape", [(40, 7), (7, 40), (300, 130)], ids=str)


def embeddings(*shape: int, seed: int = 0) -> Array:
    """Return embeddings that are neither centred nor isotropic, like real features."""
    random = np.random.default_rng(seed)
    return random.normal(size=shape) * random.exponential(size=shape[-1]) + 0.3


def tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array)


def orthogonal(rows: int, columns: int, seed: int = 0) -> Array:
    """Return a matrix with orthonormal columns."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def smooth_rank(values: Array) -> float:
    p = values / values.sum() + 1e-7
    return math.exp(-(p * np.log(p)).sum())


@SHAPES
def test_rankme_is_garridos(shape):
    z_NF = embeddings(*shape)
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(z_NF @ z_NF.T), 0, None))
    want = smooth_rank(np.sort(sigma)[::-1][: min(shape)])
    assert rankme(tensor(z_NF)) == pytest.approx(want, rel=1e-6)
    assert rankme(1e4 * tensor(z_NF)) == pytest.approx(want, rel=1e-6)
    assert rankme(tensor(z_NF) + 5) != pytest.approx(want, rel=0.05)


def test_rankme_of_known_spectra():
    # eps adds 1e-7 D log D
    assert rankme(torch.eye(50)) == pytest.approx(50, rel=1e-4)
    assert rankme(torch.outer(torch.arange(1, 31.0), torch.ones(7))) == pytest.approx(1, rel=1e-4)
    # covariance eigenvalues 1/k: singular values count more dimensions than eigenvalues
    eigenvalues = 1 / np.arange(1, 65)
    z_NF = orthogonal(200, 64) * np.sqrt(eigenvalues) @ orthogonal(64, 64, 1).T
    assert rankme(tensor(z_NF)) == pytest.approx(55.0, abs=0.05)
    by_eigenvalues = Spectrum(eigenvalues.astype(np.float32)).effective_rank_entropy
    assert by_eigenvalues == pytest.approx(29.1, abs=0.05)


@pytest.mark.parametrize("shape", [(30, 10, 6), (5, 3, 20)], ids=str)
def test_lidar_is_thilaks(shape):
    images, views, dim = shape
    e_NVF = embeddings(*shape) + embeddings(images, 1, dim, seed=1)
    means = [sample.mean(0) for sample in e_NVF]
    between = sum(np.outer(m - np.mean(means, 0), m - np.mean(means, 0)) for m in means) / images
    within = 1e-4 * np.eye(dim)
    for sample, mean in zip(e_NVF, means, strict=True):
        within += sum(np.outer(e - mean, e - mean) for e in sample) / (images * views)
    values, vectors = np.linalg.eigh(within)
    root = vectors / np.sqrt(values) @ vectors.T
    want = smooth_rank(np.clip(np.linalg.eigvalsh(root @ between @ root), 0, None))
    assert lidar(tensor(e_NVF)) == pytest.approx(want, rel=1e-6)
    assert lidar(tensor(e_NVF @ orthogonal(dim, dim))) == pytest.approx(want, rel=1e-6)
    assert lidar(tensor(e_NVF + 7)) == pytest.approx(want, rel=1e-6)


def test_lidar_counts_what_outlasts_the_views():
    """RankMe counts dimensions in use, LiDAR those where images differ more than their views."""
    random = np.random.default_rng(0)
    noise = 0.01 * random.normal(size=(200, 20, 40))
    images = np.zeros((200, 1, 40))
    images[..., :8] = random.normal(size=(200, 1, 8))
    assert lidar(tensor(images + noise)) == pytest.approx(8, rel=0.1)
    noise[..., 4:] *= 1000
    assert lidar(tensor(images + noise)) == pytest.approx(4, rel=0.1)
    assert rankme(tensor((images + noise)[:, 0])) > 30
    # N centred means span N - 1 dimensions
    few = orthogonal(40, 6).T[:, None].repeat(3, 1)
    assert lidar(tensor(few)) == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.3])
def test_alpha_req_of_a_power_law(alpha):
    eigenvalues = np.arange(1, 151.0) ** -alpha
    centred = np.random.default_rng(0).normal(size=(400, 150))
    basis = np.linalg.qr(centred - centred.mean(0))[0]

    def of(values: Array) -> float:
        return alpha_req(tensor(3 + basis * np.sqrt(values) @ orthogonal(150, 150).T))

    assert of(eigenvalues) == pytest.approx(alpha, rel=1e-6)
    # only k = 5 to 100 count
    bent = eigenvalues.copy()
    bent[:4], bent[100:] = 100, eigenvalues[99] / 100
    assert of(bent) == pytest.approx(alpha, rel=1e-6)


def test_alpha_req_is_polyfits():
    z_NF = embeddings(30, 60)
    eigenvalues = np.linalg.eigvalsh(np.cov(z_NF.T))[::-1]
    # 30 centred images have 29 eigenvalues
    want = -np.polyfit(np.log(np.arange(5, 30)), np.log(eigenvalues[4:29]), 1)[0]
    assert alpha_req(tensor(z_NF)) == pytest.approx(want, rel=1e-6)


def test_alignment_and_uniformity_are_wang_and_isolas():
    e_NVF, z_NF = embeddings(9, 4, 5), embeddings(20, 5)
    u = e_NVF / np.linalg.norm(e_NVF, axis=2, keepdims=True)
    pairs = [((u[:, a] - u[:, b]) ** 2).sum(1) for a in range(4) for b in range(a)]
    assert alignment(tensor(e_NVF)) == pytest.approx(np.mean(pairs))
    u = z_NF / np.linalg.norm(z_NF, axis=1, keepdims=True)
    squares = [((u[a] - u[b]) ** 2).sum() for a in range(20) for b in range(a)]
    assert uniformity(tensor(z_NF)) == pytest.approx(
        np.log(np.mean(np.exp(-2 * np.array(squares))))
    )


def test_alignment_and_uniformity_of_known_points():
    opposite, orthogonal_pair = torch.tensor([[1.0, 0], [-3, 0]]), torch.tensor([[2.0, 0], [0, 1]])
    assert alignment(opposite[None]) == pytest.approx(4)
    assert alignment(orthogonal_pair[None]) == pytest.approx(2)
    assert uniformity(opposite) == pytest.approx(-8)
    assert uniformity(torch.ones(6, 3)) == pytest.approx(0, abs=1e-12)
    # independent directions in many dimensions have |u - u'|^2 = 2
    many = torch.randn(500, 4000, generator=torch.Generator().manual_seed(0))
    assert uniformity(many) == pytest.approx(-4, abs=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_lost_embeddings_give_nan(value):
    z_NF, e_NVF = torch.randn(20, 8), torch.randn(10, 3, 8)
    z_NF[3, 2] = e_NVF[3, 2, 1] = value
    found = label_free(z_NF, e_NVF)
    assert len(found) == 5 and all(math.isnan(number) for number in found.values())


def test_collapsed_embeddings_give_no_error():
    found = label_free(torch.ones(20, 8), torch.ones(10, 3, 8))
    assert found["rankme"] == pytest.approx(1, rel=1e-4)
    assert [found["uniformity"], found["view_alignment"]] == pytest.approx([0, 0], abs=1e-12)
    assert math.isnan(found["lidar"]) and math.isnan(found["alpha_req"])


def test_half_precision_is_widened():
    z_NF, e_NVF = tensor(embeddings(40, 9)).bfloat16(), tensor(embeddings(9, 4, 9)).bfloat16()
    assert label_free(z_NF, e_NVF) == label_free(z_NF.double(), e_NVF.double())
