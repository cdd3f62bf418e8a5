"""Trained predictors: layers, and gradients against autograd in float64."""

import pytest
import torch
from torch import Tensor, nn

from isofast.config.schema import Config
from isofast.data import Batch
from isofast.methods import Views, make_method
from isofast.methods.ema import EmaTarget
from isofast.training.step import Online
from isofast_kernels.reference import losses_reference

from ..support.encoders import make_online

BATCH, DIM = 12, 16


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        *((name, []) for name in ("isoloss", "directpred", "directcopy")),
        *((name, [(32, 16), *[(32,)] * 3, (16, 32), (16,)]) for name in ("byol", "simsiam")),
        ("linear", [(16, 16)]),
    ],
)
def test_each_predictor_has_its_layers(small_config, name, shapes):
    config = small_config(method={"name": name})
    method = make_method(config.method, config.projector)
    assert [tuple(p.shape) for p in method.parameters()] == shapes


def _by_hand(z_BD: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The predictor in elementary operations, with batch statistics."""
    if len(weights) == 1:
        return z_BD @ weights["predictor.weight"].T
    weights = {key.removeprefix("predictor."): value for key, value in weights.items()}
    a_BH = z_BD @ weights["0.weight"].T + weights["0.bias"]
    centred_BH = a_BH - a_BH.sum(0) / BATCH
    variance_H = (centred_BH**2).sum(0) / BATCH
    a_BH = centred_BH / (variance_H + 1e-5) ** 0.5 * weights["1.weight"] + weights["1.bias"]
    return a_BH * (a_BH > 0) @ weights["3.weight"].T + weights["3.bias"]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    ("name", "ema"), [("byol", True), ("byol", False), ("simsiam", False), ("linear", True)]
)
def test_gradients_of_embeddings_and_predictor_are_autograds(small_config, name, ema, metric):
    config = small_config(method={"name": name, "metric": metric, "ema": ema})
    torch.manual_seed(1)
    method = make_method(config.method, config.projector)
    with torch.no_grad():
        for p in method.parameters():
            # BatchNorm's weights and biases away from 1 and 0
            p.add_(0.3 * torch.randn_like(p))
    z1_BD, z2_BD = (torch.randn(BATCH, DIM, requires_grad=True) for _ in range(2))
    t1_BD, t2_BD = torch.randn(2, BATCH, DIM) if ema else (z1_BD.detach(), z2_BD.detach())
    value = method.loss(Views(z1_BD, z2_BD, t1_BD, t2_BD))
    value.backward()

    z1, z2 = (z.detach().double().requires_grad_() for z in (z1_BD, z2_BD))
    ours = dict(method.named_parameters())
    weights = {key: p.detach().double().requires_grad_() for key, p in ours.items()}
    pairs = ((_by_hand(z1, weights), t2_BD.double()), (_by_hand(z2, weights), t1_BD.double()))
    kind = {"metric": metric, "isotropic": False}
    w_DD = torch.eye(DIM, dtype=torch.float64)
    loss = 2 * sum(losses_reference(p, t, w_DD, **kind).mean() for p, t in pairs)
    loss.backward()
    torch.testing.assert_close(value.double(), loss, rtol=1e-5, atol=1e-6)
    leaves = {"z1": (z1_BD, z1), "z2": (z2_BD, z2)}
    leaves |= {key: (p, weights[key]) for key, p in ours.items()}
    largest = max(p.grad.abs().max().item() for _, p in leaves.values() if p.grad is not None)
    for key, (mine, theirs) in leaves.items():
        # the gradient of a bias before BatchNorm is only what rounding leaves of the others
        atol = max(1e-4 * theirs.grad.abs().max().item(), 1e-6 * largest)
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=atol, msg=key)


def _online(config: Config, precision: torch.dtype) -> tuple[Online, Batch]:
    online = make_online(config, precision)
    return online, Batch(torch.randn(16, 3, 16, 16), torch.zeros(8, dtype=torch.long))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_predictions_follow_the_networks_precision(small_config, precision):
    online, batch = _online(small_config(method={"name": "byol"}), precision)
    predictor, seen = online.get_submodule("method.predictor"), []
    predictor.register_forward_hook(lambda module, args, p_BD: seen.append(p_BD.dtype))
    target = EmaTarget(online.branch, 0.99)
    output = online(batch, target(batch))
    assert seen == [precision] * 2 and output.z1_BD.dtype == precision
    (output.loss + output.probe.loss).backward()
    for name, p in online.named_parameters():
        assert p.dtype == torch.float32 and p.grad is not None and torch.isfinite(p.grad).all(), (
            name
        )
    assert all(p.grad is None for p in target.parameters())
    assert len(list(target.parameters())) == len(list(online.branch.parameters()))
    # like the other BatchNorms: one view at a time
    norm = online.get_submodule("method.predictor.1")
    assert isinstance(norm, nn.BatchNorm1d) and norm.num_batches_tracked == 2


@pytest.mark.slow
def test_the_predictor_is_one_graph_for_the_compiler(small_config):
    config = small_config(method={"name": "byol"})
    online, batch = _online(config, torch.bfloat16)
    names = list(online.state_dict())
    expected = online(batch).loss
    online, _ = _online(config, torch.bfloat16)
    online.get_submodule("method.predictor").compile(fullgraph=True, backend="aot_eager")
    # both round to bf16, possibly in another order
    torch.testing.assert_close(online(batch).loss, expected, rtol=2e-2, atol=2e-2)
    assert list(online.state_dict()) == names
