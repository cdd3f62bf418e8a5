"""The step against an independent statement of the paper's equations, in float64 by autograd."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isofast.config import Config
from isofast.correlation import Correlation
from isofast.data import Batch
from isofast.method import Method
from isofast.networks import Branch, Online, ViewOutput, make_target

CPU = torch.device("cpu")


def _predictor(corr_DD: Tensor, config: Config) -> Tensor:
    """Eq. 1 with the released code's normalisation and shift."""
    values_D, vectors_DD = torch.linalg.eigh(corr_DD)
    values_D = values_D.clamp(min=0)
    if config.method.normalize == "spectral":
        values_D = values_D / values_D.max()
    powered_D = (values_D + config.method.eps) ** config.method.alpha
    return vectors_DD @ powered_D.diag() @ vectors_DD.T


def _paper_loss(z_BD: Tensor, t_BD: Tensor, w_DD: Tensor, config: Config) -> Tensor:
    """The losses as the paper writes them; the isotropic ones through stopped residuals."""
    p_BD = z_BD @ w_DD
    isotropic = config.method.name == "isoloss"
    if config.method.metric == "cosine" and isotropic:
        a_B, b_B = p_BD.detach().norm(dim=1), t_BD.norm(dim=1)
        dot_B = (p_BD.detach() * t_BD).sum(1)
        values, vectors = torch.linalg.eigh(w_DD)
        half_DD = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
        quadratic_B = (z_BD @ half_DD).square().sum(1)
        per_B = -(z_BD * t_BD).sum(1) / (a_B * b_B) + dot_B * quadratic_B / (2 * a_B**3 * b_B)
    elif config.method.metric == "cosine":
        per_B = -(p_BD * t_BD).sum(1) / (p_BD.norm(dim=1) * t_BD.norm(dim=1))
    elif isotropic:
        pulled_BD = (t_BD + z_BD - p_BD).detach()
        per_B = (z_BD - pulled_BD).square().sum(1) / 2
    else:
        per_B = (p_BD - t_BD).square().sum(1) / 2
    return per_B.mean()


class _Fixed(nn.Module):
    """Embeddings as parameters, so that their gradients can be read."""

    def __init__(self, z1_BD: Tensor, z2_BD: Tensor) -> None:
        super().__init__()
        self.z1_BD, self.z2_BD = nn.Parameter(z1_BD), nn.Parameter(z2_BD)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[ViewOutput, ViewOutput]:
        logits = torch.zeros(len(x1), 3)
        return ViewOutput(self.z1_BD, logits), ViewOutput(self.z2_BD, logits)


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "no-ema"])
@pytest.mark.parametrize(
    ("metric", "of"),
    [("cosine", "embeddings"), ("cosine", "directions"), ("euclidean", "embeddings")],
)
@pytest.mark.parametrize("name", ["isoloss", "directpred", "directcopy"])
def test_gradients_are_the_papers(
    small_config: Callable[..., Config], name: str, metric: str, of: str, ema: bool
) -> None:
    """And with C of directions they differ from the paper's in C alone."""
    method = {"name": name, "metric": metric, "ema": ema, "decay": 0.5, "correlation": of}
    config = small_config(method=method)
    torch.manual_seed(1)
    batch, dim = 12, 16
    online = _Fixed(torch.randn(batch, dim), torch.randn(batch, dim))
    t1_BD, t2_BD = torch.randn(batch, dim), torch.randn(batch, dim)
    targets = iter([t1_BD, t2_BD])
    correlation = Correlation(dim, config.method, CPU, ranks=1)
    # norms that differ, or directions would be embeddings
    correlation.update(torch.randn(64, dim), torch.randn(64, dim) * torch.rand(64, 1))
    before_DD = correlation.corr_DD.double()

    def target(x: Tensor) -> tuple[None, Tensor]:
        return None, next(targets)

    step = Method(config, online, target if ema else None, correlation)  # type: ignore[arg-type]
    x = torch.zeros(batch, 3, 8, 8)
    output = step(Batch(x, x, torch.zeros(batch, dtype=torch.long)))
    output.loss.backward()

    z1, z2 = (z.detach().double().requires_grad_() for z in (online.z1_BD, online.z2_BD))
    u1, u2 = (z.detach() for z in (z1, z2))
    if of == "directions":
        u1, u2 = u1 / u1.norm(dim=1, keepdim=True), u2 / u2.norm(dim=1, keepdim=True)
    moment_DD = (u1.T @ u1 + u2.T @ u2) / (2 * batch)
    corr_DD = 0.5 * before_DD + 0.5 * moment_DD
    torch.testing.assert_close(correlation.corr_DD.double(), corr_DD, rtol=1e-5, atol=1e-6)
    w_DD = _predictor(corr_DD, config)
    t1, t2 = (t1_BD.double(), t2_BD.double()) if ema else (z1.detach(), z2.detach())
    loss = 2 * (_paper_loss(z1, t2, w_DD, config) + _paper_loss(z2, t1, w_DD, config))
    loss.backward()
    for ours, theirs in ((online.z1_BD.grad, z1.grad), (online.z2_BD.grad, z2.grad)):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=1e-6)
    if not (name == "isoloss" and metric == "euclidean"):
        # this statement of the isotropic Euclidean loss has its gradient, not its value
        torch.testing.assert_close(output.loss.double(), loss, rtol=1e-4, atol=1e-6)


def _run_of_networks(config: Config) -> tuple[Online, Branch, Method, Correlation, Batch]:
    torch.manual_seed(0)
    branch = Branch(config.encoder, config.projector, torch.float32)
    online, target = Online(branch, nn.Linear(32, 10)), make_target(branch)
    correlation = Correlation(config.projector.output, config.method, CPU, ranks=1)
    method = Method(config, online, target, correlation)
    images = torch.randn(2, 8, 3, 16, 16)
    return online, target, method, correlation, Batch(images[0], images[1], torch.arange(8))


def test_the_target_takes_no_gradient(small_config: Callable[..., Config]) -> None:
    online, target, method, _, batch = _run_of_networks(small_config())
    output = method(batch)
    (output.loss + output.probe.loss).backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for p in online.parameters())


def test_the_target_has_batch_statistics_of_its_own(
    small_config: Callable[..., Config],
) -> None:
    _, target, method, _, batch = _run_of_networks(small_config())
    output = method(batch)
    assert target.encoder.bn1.num_batches_tracked == 2
    # a fresh target equals the online network, in train mode too
    view = batch.x2_BCHW
    torch.testing.assert_close(output.t2_BD, target(view)[1].detach())


def test_metrics_of_a_step(small_config: Callable[..., Config]) -> None:
    _, _, method, correlation, batch = _run_of_networks(small_config())
    output = method(batch)
    p_BD = output.z1_BD @ output.w_DD
    cosines = [
        float(p @ t / (p.norm() * t.norm())) for p, t in zip(p_BD, output.t2_BD, strict=True)
    ]
    got = {name: value.item() for name, value in output.scalars().items()}
    z_BD = output.z1_BD.double().numpy()
    z_B = np.linalg.norm(z_BD, axis=1)
    p_B = np.linalg.norm(z_BD @ output.w_DD.double().numpy(), axis=1)
    assert got == pytest.approx(
        {
            "alignment": sum(cosines) / len(cosines),
            "embedding_std": (z_BD / z_B[:, None]).std(0, ddof=1).mean(),
            "embedding_norm": np.sqrt(np.square(z_B).mean()),
            "mean_share": np.square(z_BD.mean(0)).sum() / np.square(z_B).mean(),
            # torch's median is the lower of the two in the middle
            "norm_spread": np.quantile(z_B, 0.95) / np.sort(z_B)[(len(z_B) - 1) // 2],
            "prediction_norm": np.sort(p_B / z_B)[(len(z_B) - 1) // 2],
        },
        rel=1e-4,
    )
    assert torch.equal(correlation.corr_DD, correlation.corr_DD.T)


def test_a_collapsed_batch_gives_finite_numbers(small_config: Callable[..., Config]) -> None:
    config = small_config(method={"decay": 0.5})
    online = _Fixed(torch.zeros(6, 16), torch.zeros(6, 16))
    method = Method(config, online, None, Correlation(16, config.method, CPU, ranks=1))
    x = torch.zeros(6, 3, 8, 8)
    output = method(Batch(x, x, torch.zeros(6, dtype=torch.long)))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(value) for value in output.scalars().values())
    for grad in (online.z1_BD.grad, online.z2_BD.grad):
        assert grad is not None and torch.isfinite(grad).all()


def test_unlabelled_images_are_left_out_of_the_probe(
    small_config: Callable[..., Config],
) -> None:
    online, _, method, _, batch = _run_of_networks(small_config())
    labels: Any = torch.full((8,), -1)
    output = method(batch._replace(y_B=labels))
    assert output.probe.loss.item() == 0.0 and output.probe.top1.item() == 0.0
    (output.loss + output.probe.loss).backward()
    assert online.probe.weight.grad is not None
    assert torch.equal(online.probe.weight.grad, torch.zeros_like(online.probe.weight))
