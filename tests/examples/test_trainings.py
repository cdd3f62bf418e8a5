"""The loss in other training loops: every example brings views together, and none collapses."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from isofast.run.spectrum import effective_rank
from isofast_kernels import IsoLoss, matrix_power

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
import plain_torch  # noqa: E402
import solo_learn_style  # noqa: E402


def _pixels() -> Tensor:
    return torch.tensor(load_digits().images[:256], dtype=torch.float32) / 16


@torch.no_grad()
def _alignment(embed: nn.Module, criterion: IsoLoss, views: Tensor) -> float:
    """Return the mean cosine of an image's prediction and target, minus that over all pairs."""
    z1_BD, z2_BD = map(embed, views)
    w_DD = matrix_power(criterion.corr_DD, criterion.alpha)
    p_BD, t_BD = functional.normalize(z1_BD @ w_DD), functional.normalize(z2_BD)
    cos_BB = p_BD @ t_BD.T
    return float(cos_BB.diagonal().mean() - cos_BB.mean())


def _check(before: float, after: float, criterion: IsoLoss) -> None:
    assert after > before + 0.05
    eigenvalues = np.linalg.eigvalsh(criterion.corr_DD.double().numpy())
    assert effective_rank(eigenvalues) > 3


def test_plain_torch(tmp_path):
    torch.manual_seed(1)
    views = plain_torch.views(_pixels()[:, None])
    before = _alignment(*plain_torch.main(steps=1), views)
    network, criterion = plain_torch.main(steps=25, checkpoint=str(tmp_path / "run.pt"))
    _check(before, _alignment(network, criterion, views), criterion)
    saved = torch.load(tmp_path / "run.pt")
    assert torch.equal(saved["criterion"]["corr_DD"], criterion.corr_DD)


def test_solo_learn_style():
    torch.manual_seed(1)
    views = _pixels().flatten(1) + 0.1 * torch.randn(2, 256, 64)
    found = []
    for steps in (1, 25):
        method, criterion = solo_learn_style.main(steps)
        found.append(_alignment(lambda x, m=method: m(x)["z"], criterion, views))
    _check(*found, criterion)
    # the classifier learns alongside, on detached features
    with torch.no_grad():
        right = method(views[0])["logits"].argmax(1) == torch.tensor(load_digits().target[:256])
    assert right.float().mean() > 0.5


@pytest.mark.slow
def test_lightning_with_lightly(tmp_path):
    import lightning_lightly

    lightning_lightly.pl.seed_everything(1, verbose=False)
    views = next(iter(lightning_lightly.loader(batch_size=1024)))
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    before = _alignment(
        *lightning_lightly.main(steps=1, enable_checkpointing=False, **quiet), views
    )
    network, criterion = lightning_lightly.main(steps=30, default_root_dir=tmp_path, **quiet)
    _check(before, _alignment(network, criterion, views), criterion)
    (saved,) = tmp_path.rglob("*.ckpt")
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert torch.equal(state["criterion.corr_DD"], criterion.corr_DD)
