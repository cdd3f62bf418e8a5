"""Spectra: what they measure, and which ones a run keeps."""

import math
from contextlib import closing

import numpy as np
import pytest
import torch

from isofast.run.metrics import MetricsWriter, read_metrics, read_spectra
from isofast.run.spectrum import Spectrum, measure

DIM = 64


def basis(seed: int, dim: int = DIM) -> torch.Tensor:
    """A random rotation, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]


def symmetric(u_DD: torch.Tensor, values_D: torch.Tensor) -> torch.Tensor:
    return u_DD @ torch.diag(values_D.double()) @ u_DD.T


@pytest.mark.parametrize(
    ("eigenvalues", "ratio", "entropy"),
    [
        ([1.0] * 8, 8.0, 8.0),
        ([3.0, 0, 0], 1.0, 1.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([2.0, 1.0], 9 / 5, 3 / 4 ** (1 / 3)),
    ],
)
def test_both_ranks_count_the_dimensions_in_use(eigenvalues, ratio, entropy):
    spectrum = Spectrum(np.array(eigenvalues, np.float32))
    assert spectrum.effective_rank == pytest.approx(ratio)
    assert spectrum.effective_rank_entropy == pytest.approx(entropy)


def test_eigenvalues_come_in_descending_order_without_rounding_below_zero():
    values_D = torch.linspace(0, 5, DIM).clamp(min=1)
    values_D[:9] = 0
    spectrum = measure(symmetric(basis(1), values_D).float())
    assert spectrum.eigenvalues_D == pytest.approx(values_D.sort(descending=True).values, abs=1e-5)
    assert (spectrum.eigenvalues_D >= 0).all() and spectrum.alignment_D is None


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda c: c, 1),
        (lambda c: torch.eye(DIM), 1),
        (lambda c: torch.linalg.matrix_power(c, 3) + 0.25 * torch.eye(DIM), 1),
        (lambda c: -c, -1),
        (lambda c: torch.zeros(DIM, DIM), 0),
    ],
)
def test_functions_of_c_are_aligned_with_it(function, expected):
    corr_DD = symmetric(basis(2), torch.linspace(0.5, 2, DIM))
    spectrum = measure(corr_DD, function(corr_DD))
    assert spectrum.alignment_D == pytest.approx(np.full(DIM, expected), abs=1e-6)
    assert spectrum.predictor_alignment == pytest.approx(expected, abs=1e-6)


def test_alignment_follows_the_order_of_the_eigenvalues():
    u_DD = basis(3, 4)
    corr_DD = symmetric(u_DD, torch.tensor([4.0, 3.0, 2.0, 1.0]))
    # keeps u_0, rotates u_1 by 60 degrees towards u_3, maps u_2 to u_3 and u_3 to -u_3
    to = u_DD[:, [0, 1, 3, 3]] * torch.tensor([1, 0.5, 1, -1])
    to[:, 1] += math.sqrt(0.75) * u_DD[:, 3]
    spectrum = measure(corr_DD, to @ u_DD.T)
    assert spectrum.alignment_D == pytest.approx([1, 0.5, 0, -1], abs=1e-6)
    assert spectrum.predictor_alignment == pytest.approx((4 + 1.5 + 0 - 1) / 10, abs=1e-6)


def test_a_matrix_that_is_lost_gives_nan_and_no_error():
    spectrum = measure(torch.full((3, 3), torch.nan), torch.eye(3))
    assert np.isnan(spectrum.eigenvalues_D).all() and np.isnan(spectrum.alignment_D).all()
    assert math.isnan(spectrum.effective_rank) and math.isnan(spectrum.effective_rank_entropy)
    assert math.isnan(spectrum.predictor_alignment)


def test_files_without_alignment_stay_readable(tmp_path):
    path = tmp_path / "spectrum.npz"
    np.savez(path, step=np.array([1, 2]), eigenvalues=np.ones((2, 3), np.float32))
    with closing(MetricsWriter(tmp_path, 2)) as writer:
        writer.spectrum(3, Spectrum(np.ones(3, np.float32), np.ones(3, np.float32)))
    with np.load(path) as stored:
        assert stored["step"].tolist() == [1, 2, 3]
        assert np.isnan(stored["alignment"][:2]).all() and (stored["alignment"][2] == 1).all()


@pytest.mark.slow
def test_a_run_keeps_spectra_at_records_ends_of_epochs_and_where_asked(spectrum_runs):
    _, run_dir = spectrum_runs["linear"]
    with np.load(run_dir / "spectrum.npz") as stored:
        # every 8 steps, at each record (every 10 and the last), at the end of the epoch
        assert stored["step"].tolist() == [8, 10, 16, 20, 22, 24]
        assert stored["alignment"].shape == stored["eigenvalues"].shape == (6, 16)
        assert (np.abs(stored["alignment"]) <= 1).all() and np.ptp(stored["alignment"]) > 0.1
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]
    spectra = read_spectra(run_dir / "spectrum.npz")
    assert [record["step"] for record in records] == [10, 20, 24]
    for record in records:
        spectrum = spectra[record["step"]]
        assert record["effective_rank"] == spectrum.effective_rank
        assert record["effective_rank_entropy"] == spectrum.effective_rank_entropy
        assert record["predictor_alignment"] == pytest.approx(spectrum.predictor_alignment)
    _, other = spectrum_runs["ema"]
    with np.load(other / "spectrum.npz") as stored:
        assert stored["step"].tolist() == [10, 20, 22, 24] and "alignment" not in stored
    assert "predictor_alignment" not in read_metrics(other / "metrics.jsonl")[0]
