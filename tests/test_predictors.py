"""Trained predictors: their layers, their gradients against autograd in float64, who owns them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from isofast.config import Config, MethodConfig, ProjectorConfig
from isofast.correlation import Correlation
from isofast.data import Batch
from isofast.method import Method
from isofast.networks import Branch, Online, ViewOutput, make_predictor, make_target

CPU = torch.device("cpu")
BATCH, DIM = 12, 16


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_byol_and_simsiam_have_the_papers_head(name: str) -> None:
    method = MethodConfig(name=name, ema=name == "byol", alpha=None, eps=None, normalize=None)
    predictor = make_predictor(method, ProjectorConfig())
    assert isinstance(predictor, nn.Sequential)
    first, norm, act, last = predictor
    assert (first.in_features, first.out_features) == (256, 4096)
    assert (last.in_features, last.out_features) == (4096, 256)
    assert first.bias is not None and last.bias is not None
    assert isinstance(norm, nn.BatchNorm1d) and isinstance(act, nn.ReLU)
    narrow = make_predictor(method, ProjectorConfig(hidden=7, output=5))
    assert narrow is not None and [tuple(p.shape) for p in narrow.parameters()] == [
        (7, 5),
        (7,),
        (7,),
        (7,),
        (5, 7),
        (5,),
    ]


def test_linear_has_a_matrix_and_the_closed_forms_nothing() -> None:
    linear = MethodConfig(name="linear", alpha=None, eps=None, normalize=None)
    predictor = make_predictor(linear, ProjectorConfig(output=8))
    assert predictor is not None
    assert [tuple(p.shape) for p in predictor.parameters()] == [(8, 8)]
    for name in ("isoloss", "directpred", "directcopy"):
        assert make_predictor(MethodConfig(name=name), ProjectorConfig()) is None


class _Embeddings(nn.Module):
    """Embeddings as parameters before a real predictor."""

    def __init__(self, predictor: nn.Module | None) -> None:
        super().__init__()
        self.z1_BD, self.z2_BD = (nn.Parameter(torch.randn(BATCH, DIM)) for _ in range(2))
        self.predictor = predictor

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[ViewOutput, ViewOutput]:
        def view(z_BD: Tensor) -> ViewOutput:
            p_BD = None if self.predictor is None else self.predictor(z_BD)
            return ViewOutput(z_BD, torch.zeros(BATCH, 3), p_BD)

        return view(self.z1_BD), view(self.z2_BD)


def _by_hand(z_BD: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The predictor in elementary operations, with the batch's own statistics."""
    if len(weights) == 1:
        return z_BD @ weights["weight"].T
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


def _step(config: Config) -> tuple[_Embeddings, Correlation, Method, list[Tensor], Batch]:
    torch.manual_seed(1)
    online = _Embeddings(make_predictor(config.method, config.projector))
    with torch.no_grad():
        for p in online.parameters():
            # BatchNorm's weights and biases away from 1 and 0
            p.add_(0.3 * torch.randn_like(p))
    targets = list(torch.randn(2, BATCH, DIM))
    queue = iter(targets)
    correlation = Correlation(DIM, config.method, CPU, ranks=1)
    correlation.corr_DD.copy_(torch.eye(DIM))

    def target(x: Tensor) -> tuple[None, Tensor]:
        return None, next(queue)

    chosen: Branch | None = target if config.method.ema else None  # type: ignore[assignment]
    method = Method(config, online, chosen, correlation, online.predictor)
    x = torch.zeros(BATCH, 3, 8, 8)
    return online, correlation, method, targets, Batch(x, x, torch.zeros(BATCH, dtype=torch.long))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    ("name", "ema"), [("byol", True), ("byol", False), ("simsiam", False), ("linear", True)]
)
def test_gradients_of_embeddings_and_predictor_are_autograds(
    small_config: Callable[..., Config], name: str, ema: bool, metric: str
) -> None:
    raw = {"name": name, "metric": metric, "ema": ema, "correlation": "embeddings"}
    config = small_config(method=raw)
    online, correlation, method, targets, batch = _step(config)
    output = method(batch)
    output.loss.backward()

    z1, z2 = (z.detach().double().requires_grad_() for z in (online.z1_BD, online.z2_BD))
    assert online.predictor is not None
    ours = dict(online.predictor.named_parameters())
    weights = {key: p.detach().double().requires_grad_() for key, p in ours.items()}
    t1, t2 = (t.double() for t in targets) if ema else (z1.detach(), z2.detach())
    p1, p2 = _by_hand(z1, weights), _by_hand(z2, weights)
    loss = 2 * (_loss_by_hand(p1, t2, metric) + _loss_by_hand(p2, t1, metric))
    loss.backward()
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-6)
    pairs = {"z1": (online.z1_BD, z1), "z2": (online.z2_BD, z2)}
    pairs |= {key: (p, weights[key]) for key, p in ours.items()}
    largest = max(p.grad.abs().max().item() for _, p in pairs.values() if p.grad is not None)
    for key, (mine, theirs) in pairs.items():
        assert mine.grad is not None and theirs.grad is not None
        # a bias before BatchNorm has no gradient but what rounding leaves of the others
        atol = max(1e-4 * theirs.grad.abs().max().item(), 1e-6 * largest)
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=atol, msg=key)
    moment_DD = (z1.T @ z1 + z2.T @ z2).detach() / (2 * BATCH)
    expected_DD = 0.99 * torch.eye(DIM, dtype=torch.float64) + 0.01 * moment_DD
    torch.testing.assert_close(correlation.corr_DD.double(), expected_DD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["isoloss", "directcopy", "byol", "simsiam", "linear"])
def test_a_step_gives_the_predictor_and_its_alignment(
    small_config: Callable[..., Config], name: str
) -> None:
    online, correlation, method, targets, batch = _step(small_config(method={"name": name}))
    output = method(batch)
    t2_BD = targets[1] if name != "simsiam" else online.z2_BD.detach()
    assert torch.equal(output.t2_BD, t2_BD)
    if name in ("byol", "simsiam"):
        assert output.w_DD is None and online.predictor is not None
        p_BD = online.predictor(online.z1_BD)
    else:
        # p = W z, a row of embeddings at a time
        weight_DD = dict(online.named_parameters()).get("predictor.weight")
        expected_DD = correlation.predictor() if weight_DD is None else weight_DD
        assert output.w_DD is not None and torch.equal(output.w_DD, expected_DD)
        assert not output.w_DD.requires_grad
        p_BD = torch.stack([output.w_DD @ z_D for z_D in online.z1_BD])
    pairs = zip(p_BD.detach(), t2_BD, strict=True)
    cosines = [float(p @ t / p.norm() / t.norm()) for p, t in pairs]
    assert output.scalars()["alignment"].item() == pytest.approx(sum(cosines) / BATCH, abs=1e-5)


def test_zero_predictions_give_finite_numbers(small_config: Callable[..., Config]) -> None:
    online, _, method, _, batch = _step(small_config(method={"name": "linear"}))
    with torch.no_grad():
        for p in online.parameters():
            p.zero_()
    output = method(batch)
    output.loss.backward()
    assert torch.isfinite(output.loss) and torch.isfinite(output.scalars()["alignment"])
    for name, p in online.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_predictions_follow_the_networks_precision(
    small_config: Callable[..., Config], precision: torch.dtype
) -> None:
    config = small_config(method={"name": "byol"})
    branch = Branch(config.encoder, config.projector, precision)
    predictor = make_predictor(config.method, config.projector)
    online = Online(branch, nn.Linear(32, 3), predictor)
    target = make_target(online.branch)
    correlation = Correlation(16, config.method, CPU, ranks=1)
    x1, x2 = torch.randn(2, 8, 3, 16, 16)
    view, _ = online(x1, x2)
    assert view.p_BD is not None and view.p_BD.dtype == view.z_BD.dtype == precision
    output = Method(config, online, target, correlation, predictor)(
        Batch(x1, x2, torch.zeros(8, dtype=torch.long))
    )
    (output.loss + output.probe.loss).backward()
    for name, p in online.named_parameters():
        assert p.dtype == torch.float32 and p.grad is not None and torch.isfinite(p.grad).all(), (
            name
        )
    assert all(p.grad is None for p in target.parameters())
    assert len(list(target.parameters())) == len(list(branch.parameters()))
    # as the other BatchNorms: a view at a time
    norm = online.get_submodule("predictor.1")
    assert isinstance(norm, nn.BatchNorm1d) and norm.num_batches_tracked == 4


def test_the_predictor_is_one_graph_for_the_compiler(
    small_config: Callable[..., Config],
) -> None:
    config = small_config(method={"name": "byol"})
    torch.manual_seed(0)
    branch = Branch(config.encoder, config.projector, torch.bfloat16)
    predictor = make_predictor(config.method, config.projector)
    assert predictor is not None
    online = Online(branch, nn.Linear(32, 3), predictor)
    names = list(online.state_dict())
    x1, x2 = torch.randn(2, 8, 3, 16, 16)
    expected = [view.p_BD for view in online(x1, x2)]
    predictor.compile(fullgraph=True, backend="aot_eager")
    for view, wanted in zip(online(x1, x2), expected, strict=True):
        assert view.p_BD is not None and wanted is not None and view.p_BD.dtype == torch.bfloat16
        # both round to bf16, in whatever order
        torch.testing.assert_close(view.p_BD, wanted, rtol=2e-2, atol=2e-2)
    assert list(online.state_dict()) == names
