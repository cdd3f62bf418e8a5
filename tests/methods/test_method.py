"""The step against the specification, assembled here in float64, by autograd."""

import numpy as np
import pytest
import torch
from torch import nn

from isofast.config.schema import Config
from isofast.data import Batch
from isofast.methods import Views, make_method
from isofast.methods.closed_form import ClosedForm
from isofast.methods.ema import EmaTarget
from isofast.methods.probe import probe_loss
from isofast.training.step import Online, embedding_scalars
from isofast_kernels import reference

from ..support.encoders import make_online


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "no-ema"])
@pytest.mark.parametrize(
    ("metric", "of"),
    [("cosine", "embeddings"), ("cosine", "directions"), ("euclidean", "embeddings")],
)
@pytest.mark.parametrize("name", ["isoloss", "directpred", "directcopy"])
def test_a_step_is_the_specifications(small_config, name, metric, of, ema):
    """C before W, each view against the other's target, both directions counted twice."""
    method = {"name": name, "metric": metric, "ema": ema, "decay": 0.5, "correlation": of}
    config = small_config(method=method)
    torch.manual_seed(1)
    batch, dim = 12, 16
    z1_BD, z2_BD = (torch.randn(batch, dim, requires_grad=True) for _ in range(2))
    t1_BD, t2_BD = torch.randn(2, batch, dim) if ema else (z1_BD.detach(), z2_BD.detach())
    step = make_method(config.method, config.projector)
    # with equal norms, C of directions could not be told from C of embeddings
    step.correlation.update(torch.randn(64, dim), torch.randn(64, dim) * torch.rand(64, 1))
    before_DD = step.correlation.corr_DD.double()
    step.correlation.update(z1_BD.detach(), z2_BD.detach())
    value = step.loss(Views(z1_BD, z2_BD, t1_BD, t2_BD))
    value.backward()

    z1, z2 = (z.detach().double().requires_grad_() for z in (z1_BD, z2_BD))
    u1, u2 = (z.detach() for z in (z1, z2))
    if of == "directions":
        u1, u2 = u1 / u1.norm(dim=1, keepdim=True), u2 / u2.norm(dim=1, keepdim=True)
    moment_DD = (u1.T @ u1 + u2.T @ u2) / (2 * batch)
    corr_DD = 0.5 * before_DD + 0.5 * moment_DD
    torch.testing.assert_close(step.correlation.corr_DD.double(), corr_DD, rtol=1e-5, atol=1e-6)
    power = {"eps": config.method.eps, "normalize": config.method.normalize}
    w_DD = reference.matrix_power_reference(corr_DD, config.method.alpha, **power)
    kind = {"metric": metric, "isotropic": name == "isoloss"}
    pairs = ((z1, t2_BD.double()), (z2, t1_BD.double()))
    loss = 2 * sum(reference.losses_reference(z, t, w_DD, **kind).mean() for z, t in pairs)
    loss.backward()
    for ours, theirs in ((z1_BD.grad, z1.grad), (z2_BD.grad, z2.grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(value.double(), loss, rtol=1e-4, atol=1e-6)


def _networks(config: Config) -> tuple[Online, EmaTarget, Batch]:
    online = make_online(config)
    batch = Batch(torch.randn(16, 3, 16, 16), torch.arange(8))
    return online, EmaTarget(online.branch, 0.99), batch


def test_the_target_takes_no_gradient_and_the_probe_sends_none_on(small_config):
    online, target, batch = _networks(small_config())
    output = online(batch, target(batch))
    output.probe.loss.backward()
    assert all(p.grad is None for p in online.branch.parameters())
    output.loss.backward()
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.grad is not None for p in online.parameters())


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_target_is_a_copy_with_batch_statistics_of_its_own(small_config, mode):
    """Whatever mode the encoder is in."""
    online, _, batch = _networks(small_config())
    online.branch.encoder.train(mode)
    target = EmaTarget(online.branch, 0.99)
    online.train()
    before = online.branch.encoder.bn1.running_mean.clone()
    targets = target(batch)
    assert not torch.equal(target.branch.encoder.bn1.running_mean, before)
    assert torch.equal(online.branch.encoder.bn1.running_mean, before)
    # a fresh target equals the online network, in train mode too
    own = tuple(online.branch(view)[1].detach() for view in batch.x_NCHW.chunk(2))
    torch.testing.assert_close(targets, own)


@pytest.mark.parametrize("name", ["isoloss", "directcopy", "byol", "simsiam", "linear"])
def test_metrics_of_a_step(small_config, name):
    online, target, batch = _networks(small_config(method={"name": name}))
    _, t2_BD = targets = target(batch)
    output = online(batch, targets)
    method, z_BD = online.method, output.z1_BD
    p_BD = z_BD @ method.predictor() if isinstance(method, ClosedForm) else method.predictor(z_BD)
    w_DD = method.matrix()
    assert (w_DD is not None) == (name == "linear")
    if w_DD is not None:
        torch.testing.assert_close(torch.stack([w_DD @ z_D for z_D in z_BD]), p_BD)
        assert not w_DD.requires_grad
    scalars = embedding_scalars(z_BD) | method.scalars()
    z_BD, p_BD, t_BD = (x.detach().double().numpy() for x in (z_BD, p_BD, t2_BD))
    z_B, p_B, t_B = (np.linalg.norm(x, axis=1) for x in (z_BD, p_BD, t_BD))
    # torch's median is the lower of the two middle values
    middle = (len(z_B) - 1) // 2
    assert {name: value.item() for name, value in scalars.items()} == pytest.approx(
        {
            "alignment": ((p_BD * t_BD).sum(1) / (p_B * t_B)).mean(),
            "embedding_std": (z_BD / z_B[:, None]).std(0, ddof=1).mean(),
            "embedding_norm": np.sqrt(np.square(z_B).mean()),
            "mean_share": np.square(z_BD.mean(0)).sum() / np.square(z_B).mean(),
            "norm_spread": np.quantile(z_B, 0.95) / np.sort(z_B)[middle],
            "prediction_norm": np.sort(p_B / z_B)[middle],
        },
        rel=1e-4,
        abs=1e-6,
    )
    corr_DD = method.correlation.corr_DD
    assert torch.equal(corr_DD, corr_DD.T)


def test_without_targets_the_other_view_is_one(small_config):
    online, _, batch = _networks(small_config(method={"ema": False}))
    output = online(batch)
    z1_BD, z2_BD = (online.branch(view)[1] for view in (batch.x1_BCHW, batch.x2_BCHW))
    value = online.method.loss(Views(z1_BD, z2_BD, z1_BD.detach(), z2_BD.detach()))
    torch.testing.assert_close(output.loss, value)
    seen: list[Views] = []
    online.method.loss = lambda views: seen.append(views) or views.z1_BD.sum()
    online(batch)
    assert not seen[0].t1_BD.requires_grad and not seen[0].t2_BD.requires_grad


def test_c_and_the_probe_are_of_both_online_views(small_config):
    """Whatever the targets."""
    online, _, batch = _networks(small_config(method={"decay": 0.0, "correlation": "embeddings"}))
    h_NF, z_ND = (torch.cat(both) for both in zip(*online.branch.of_views(batch), strict=True))
    output = online(batch, tuple(torch.randn(2, 8, 16)))
    torch.testing.assert_close(online.method.correlation.corr_DD, z_ND.T @ z_ND / 16)
    logits_NK, y_N = online.probe(h_NF), batch.y_B.repeat(2)
    torch.testing.assert_close(output.probe.loss, nn.functional.cross_entropy(logits_NK, y_N))
    assert output.probe.top1 == (logits_NK.argmax(1) == y_N).float().mean()


def test_directions_of_bf16_embeddings_are_not_rounded(small_config):
    config = small_config(method={"decay": 0.0, "correlation": "directions"})
    z_BD = torch.randn(8, 16).bfloat16()
    correlation = make_method(config.method, config.projector).correlation
    correlation.update(z_BD)
    u_BD = nn.functional.normalize(z_BD.float(), dim=1)
    torch.testing.assert_close(correlation.corr_DD, u_BD.T @ u_BD / 8, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["isoloss", "linear"])
def test_a_collapsed_batch_gives_finite_numbers(small_config, name):
    config = small_config(method={"name": name})
    z1_BD, z2_BD = (torch.zeros(6, 16, requires_grad=True) for _ in range(2))
    method = make_method(config.method, config.projector)
    for p in method.parameters():
        nn.init.zeros_(p)
    loss = method.loss(Views(z1_BD, z2_BD, z1_BD.detach(), z2_BD.detach()))
    loss.backward()
    scalars = embedding_scalars(z1_BD.detach()) | method.scalars()
    grads = [p.grad for p in (z1_BD, z2_BD, *method.parameters())]
    for value in (loss, *grads, *scalars.values()):
        assert value is not None and torch.isfinite(value).all()


def test_a_label_on_one_of_four_ranks_is_the_batchs_only_one(monkeypatch):
    monkeypatch.setattr("isofast.methods.probe.world_size", lambda: 4)
    monkeypatch.setattr("isofast.methods.probe.mean_over_ranks_", lambda labels: labels / 4)
    logits_BK = torch.randn(3, 10)
    y_B = torch.tensor([-1, logits_BK[1].argmax(), -1])
    found = probe_loss(logits_BK, logits_BK, y_B, uneven=True)
    # averaged with the zeros of the other ranks
    expected = nn.functional.cross_entropy(logits_BK[1:2], y_B[1:2])
    torch.testing.assert_close(found.loss / 4, expected)
    assert found.top1 / 4 == 1


def test_unlabelled_images_are_left_out_of_the_probe(small_config):
    online, _, batch = _networks(small_config(method={"ema": False}))
    output = online(batch._replace(y_B=torch.full((8,), -1)))
    assert output.probe.loss.item() == 0.0 and output.probe.top1.item() == 0.0
    (output.loss + output.probe.loss).backward()
    assert torch.equal(online.probe.weight.grad, torch.zeros_like(online.probe.weight))
