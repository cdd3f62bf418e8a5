"""Trained predictors: their layers, their gradients against autograd in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from isofast.config.schema import Config, ProjectorConfig
from isofast.data import Batch
from isofast.methods import Method, Views, make_method
from isofast.methods.closed_form import ClosedForm
from isofast.methods.ema import EmaTarget
from isofast.methods.networks import Branch
from isofast.methods.trained import BYOL, Linear, SimSiam, TrainedPredictor
from isofast.training.step import Online

BATCH, DIM = 12, 16


@pytest.mark.parametrize("method", [BYOL, SimSiam])
def test_byol_and_simsiam_have_the_papers_head(method: type[TrainedPredictor]) -> None:
    predictor = method(method.Config(), ProjectorConfig()).predictor
    assert isinstance(predictor, nn.Sequential)
    first, norm, act, last = predictor
    assert (first.in_features, first.out_features) == (256, 4096)
    assert (last.in_features, last.out_features) == (4096, 256)
    assert first.bias is not None and last.bias is not None
    assert isinstance(norm, nn.BatchNorm1d) and isinstance(act, nn.ReLU)
    narrow = method(method.Config(), ProjectorConfig(hidden=7, output=5))
    shapes = [tuple(p.shape) for p in narrow.parameters()]
    assert shapes == [(7, 5), (7,), (7,), (7,), (5, 7), (5,)]


def test_linear_has_a_matrix_and_the_closed_forms_nothing(
    small_config: Callable[..., Config],
) -> None:
    linear = Linear(Linear.Config(), ProjectorConfig(output=8))
    assert [tuple(p.shape) for p in linear.parameters()] == [(8, 8)]
    for name in ("isoloss", "directpred", "directcopy"):
        config = small_config(method={"name": name})
        assert not list(make_method(config.method, config.projector).parameters())


def _by_hand(z_BD: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The predictor in elementary operations, with the batch's own statistics."""
    if len(weights) == 1:
        return z_BD @ weights["predictor.weight"].T
    weights = {key.removeprefix("predictor."): value for key, value in weights.items()}
    a_BH = z_BD @ weights["0.weight"].T + weights["0.bias"]
    centred_BH = a_BH - a_BH.sum(0) / BATCH
    variance_H = (centred_BH**2).sum(0) / BATCH
    a_BH = centred_BH / (variance_H + 1e-5) ** 0.5 * weights["1.weight"] + weights["1.bias"]
    return a_BH * (a_BH > 0) @ weights["3.weight"].T + weights["3.bias"]


def _loss_by_hand(p_BD: Tensor, t_BD: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return ((p_BD - t_BD) ** 2).sum() / 2 / BATCH
    cosine_B = (p_BD * t_BD).sum(1) / (p_BD**2).sum(1) ** 0.5 / (t_BD**2).sum(1) ** 0.5
    return -cosine_B.sum() / BATCH


def _step(config: Config) -> tuple[Method, Views]:
    torch.manual_seed(1)
    method = make_method(config.method, config.projector)
    with torch.no_grad():
        for p in method.parameters():
            # BatchNorm's weights and biases away from 1 and 0
            p.add_(0.3 * torch.randn_like(p))
    z1_BD, z2_BD = (torch.randn(BATCH, DIM, requires_grad=True) for _ in range(2))
    ema = config.method.ema
    t1_BD, t2_BD = torch.randn(2, BATCH, DIM) if ema else (z1_BD.detach(), z2_BD.detach())
    return method, Views(z1_BD, z2_BD, t1_BD, t2_BD)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    ("name", "ema"), [("byol", True), ("byol", False), ("simsiam", False), ("linear", True)]
)
def test_gradients_of_embeddings_and_predictor_are_autograds(
    small_config: Callable[..., Config], name: str, ema: bool, metric: str
) -> None:
    method, views = _step(small_config(method={"name": name, "metric": metric, "ema": ema}))
    value = method.loss(views)
    value.backward()

    z1, z2 = (z.detach().double().requires_grad_() for z in (views.z1_BD, views.z2_BD))
    ours = dict(method.named_parameters())
    weights = {key: p.detach().double().requires_grad_() for key, p in ours.items()}
    p1, p2 = _by_hand(z1, weights), _by_hand(z2, weights)
    t1, t2 = views.t1_BD.double(), views.t2_BD.double()
    loss = 2 * (_loss_by_hand(p1, t2, metric) + _loss_by_hand(p2, t1, metric))
    loss.backward()
    torch.testing.assert_close(value.double(), loss, rtol=1e-5, atol=1e-6)
    pairs = {"z1": (views.z1_BD, z1), "z2": (views.z2_BD, z2)}
    pairs |= {key: (p, weights[key]) for key, p in ours.items()}
    largest = max(p.grad.abs().max().item() for _, p in pairs.values() if p.grad is not None)
    for key, (mine, theirs) in pairs.items():
        assert mine.grad is not None and theirs.grad is not None
        # a bias before BatchNorm has no gradient but what rounding leaves of the others
        atol = max(1e-4 * theirs.grad.abs().max().item(), 1e-6 * largest)
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=atol, msg=key)


@pytest.mark.parametrize("name", ["isoloss", "directcopy", "byol", "simsiam", "linear"])
def test_a_step_records_the_predictions_alignment(
    small_config: Callable[..., Config], name: str
) -> None:
    method, views = _step(small_config(method={"name": name}))
    method.correlation.corr_DD.copy_(torch.eye(DIM))
    method.correlation.update(views.z1_BD.detach(), views.z2_BD.detach())
    method.loss(views)
    if isinstance(method, ClosedForm):
        assert method.matrix() is None
        p_BD = views.z1_BD @ method.predictor()
    else:
        assert isinstance(method, TrainedPredictor)
        p_BD = method.predictor(views.z1_BD)
    if isinstance(method, Linear):
        # p = W z, a row of embeddings at a time
        torch.testing.assert_close(torch.stack([method.matrix() @ z for z in views.z1_BD]), p_BD)
        assert not method.matrix().requires_grad
    pairs = zip(p_BD.detach(), views.t2_BD, strict=True)
    cosines = [float(p @ t / p.norm() / t.norm()) for p, t in pairs]
    assert method.scalars()["alignment"].item() == pytest.approx(sum(cosines) / BATCH, abs=1e-5)


def test_zero_predictions_give_finite_numbers(small_config: Callable[..., Config]) -> None:
    method, views = _step(small_config(method={"name": "linear"}))
    with torch.no_grad():
        for p in (*method.parameters(), views.z1_BD, views.z2_BD):
            p.zero_()
    loss = method.loss(views)
    loss.backward()
    grads = [p.grad for p in (*method.parameters(), views.z1_BD, views.z2_BD)]
    for value in (loss, method.scalars()["alignment"], *grads):
        assert value is not None and torch.isfinite(value).all()


def _online(config: Config, precision: torch.dtype) -> tuple[Online, Batch]:
    torch.manual_seed(0)
    branch = Branch(config.encoder, config.projector, precision)
    online = Online(branch, nn.Linear(32, 3), make_method(config.method, config.projector))
    return online, Batch(*torch.randn(2, 8, 3, 16, 16), torch.zeros(8, dtype=torch.long))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_predictions_follow_the_networks_precision(
    small_config: Callable[..., Config], precision: torch.dtype
) -> None:
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
    # as the other BatchNorms: a view at a time
    norm = online.get_submodule("method.predictor.1")
    assert isinstance(norm, nn.BatchNorm1d) and norm.num_batches_tracked == 2


def test_the_predictor_is_one_graph_for_the_compiler(
    small_config: Callable[..., Config],
) -> None:
    config = small_config(method={"name": "byol"})
    online, batch = _online(config, torch.bfloat16)
    names = list(online.state_dict())
    expected = online(batch).loss
    online, _ = _online(config, torch.bfloat16)
    online.get_submodule("method.predictor").compile(fullgraph=True, backend="aot_eager")
    # both round to bf16, in whatever order
    torch.testing.assert_close(online(batch).loss, expected, rtol=2e-2, atol=2e-2)
    assert list(online.state_dict()) == names
