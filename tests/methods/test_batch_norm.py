"""BatchNorm by view: equal to one call per view, on one rank and several, eager and compiled."""

import copy
from itertools import product
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from isofast.config.schema import EncoderConfig, ProjectorConfig
from isofast.data import Batch
from isofast.distributed import World
from isofast.errors import UserError
from isofast.methods.batch_norm import convert_batch_norm
from isofast.methods.networks import Branch, _join_relus, make_encoder, make_projector
from isofast.training.build import build

from ..support.runs import forked, launched

# relative to each tensor's norm
BUDGET = {torch.float32: 1e-5, torch.float64: 1e-12}
LINEAR = ("1.0.bias", "projector.0.bias")
STEMS = {"cifar": 16, "tiny": 32, "imagenet": 48}
Stem = Literal["cifar", "tiny", "imagenet"]
Case = tuple[str, torch.dtype, bool]


def network(stem: str, dtype: torch.dtype) -> nn.Module:
    """Return a network with torch's own BatchNorm, whose weights are not all one."""
    torch.manual_seed(0)
    encoder = make_encoder(EncoderConfig(stem=stem, width=8))
    net = nn.Sequential(encoder, make_projector(64, ProjectorConfig(hidden=32, output=16)))
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
    return net.to(dtype)


def images(side: int, dtype: torch.dtype) -> Tensor:
    """(2, 8, 3, side, side), the second view with another mean and contrast."""
    x_VBCHW = torch.randn(2, 8, 3, side, side, generator=torch.Generator().manual_seed(1))
    x_VBCHW[1] = 3 * x_VBCHW[1] + 1
    return x_VBCHW.to(dtype)


def results(net: nn.Module, z_ND: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics after the backward pass of a row-weighted loss."""
    weight = torch.linspace(-1, 2, z_ND.numel(), dtype=z_ND.dtype, device=z_ND.device).view_as(z_ND)
    (z_ND * weight + z_ND.square()).mean().backward()
    found = {"output": z_ND.detach()}
    # the gradient of a bias before a BatchNorm is only rounding
    found |= {f"grad {n}": p.grad for n, p in net.named_parameters() if not n.endswith(LINEAR)}
    return found | {n: b for n, b in net.named_buffers() if b.is_floating_point()}


def fused_branch(name: str, fused: bool, stem: Stem = "cifar") -> Branch:
    """Return a float64 branch that takes both views in one call."""
    torch.manual_seed(0)
    config = EncoderConfig(name=name, stem=stem, width=8 if name == "resnet18" else 64)
    projector = ProjectorConfig(hidden=32, output=16)
    branch = Branch(config, projector, torch.float32, 16, stacked=True, fused=fused)
    return branch.double()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], budget: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= budget, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("kind", ["eval", "train", "fused"])
def test_one_call_equals_a_call_a_view(stem, dtype, kind):
    theirs = network(stem, dtype).train(kind != "eval")
    ours = convert_batch_norm(copy.deepcopy(theirs), views=2, fused=kind == "fused")
    x_VBCHW = images(STEMS[stem], dtype)
    expected = results(theirs, torch.cat([theirs(x_BCHW) for x_BCHW in x_VBCHW]))
    found = results(ours, ours(x_VBCHW.flatten(0, 1)))
    # torch sums in double on a CPU: over so many layers, fused sums differ by up to two budgets
    assert_equal(found, expected, BUDGET[dtype] * (2 if kind == "fused" else 1))
    if kind == "fused":
        twice = convert_batch_norm(network(stem, dtype), views=1, fused=True)
        expected = results(twice, torch.cat([twice(x_BCHW) for x_BCHW in x_VBCHW]))
        assert_equal(found, expected, BUDGET[dtype])


def converted(features: int, *, dtype: torch.dtype = torch.float32, **how: Any) -> nn.Module:
    return convert_batch_norm(nn.BatchNorm1d(features, dtype=dtype), **{"views": 2, **how})


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("shape", "then"),
    [((12, 5), ""), ((12, 5), "relu"), *(((12, 5, 4, 3), then) for then in ("", "relu", "pool"))],
    ids=str,
)
def test_a_fused_layer_is_torchs(shape, then, views, dtype):
    torch.manual_seed(0)
    layers = [converted(5, views=views, fused=fused, dtype=dtype) for fused in (False, True)]
    nn.init.normal_(layers[0].weight)
    nn.init.normal_(layers[0].bias)
    layers[1].load_state_dict(layers[0].state_dict())
    x = (1 + 2 * torch.randn(shape)).to(dtype)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    found = []
    for layer in layers:
        leaf = x.clone().requires_grad_(True)
        y = layer(leaf, **{then: True} if then else {})
        assert y.stride() == (x.stride() if then != "pool" else (20, 1, 10, 5))
        found.append(results(layer, y) | {"grad x": leaf.grad})
    assert_equal(found[1], found[0], BUDGET[dtype])


def test_a_fused_layer_keeps_x_alone():
    layer, x_NC = converted(3, fused=True), torch.randn(1000, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        layer(x_NC.requires_grad_(True), relu=True)
    assert [x.data_ptr() for x in kept if len(x) == 1000] == [x_NC.data_ptr()]


@pytest.mark.parametrize("std", [1, 0.1, 0.01])
def test_a_large_mean_costs_digits(std):
    """The variance is off by fp32's rounding times (mean / std)^2, y by half that."""
    x_NC = 10 + std * torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    y_NC, exact_NC = (converted(64, fused=True, dtype=t)(x_NC.to(t)) for t in BUDGET)
    error = (y_NC - exact_NC).norm() / exact_NC.norm()
    assert error <= 1.2e-7 * (1 + (10 / std) ** 2)


def test_a_constant_channel_is_finite():
    """E[x^2] - E[x]^2 of constants may be below 0."""
    x_NC = (1000 + torch.linspace(0, 100, 64)).expand(96, 64)
    layer = converted(64, fused=True)
    assert layer(x_NC).isfinite().all() and (layer.running_var >= 0).all()


def test_a_layer_without_weights_is_torchs():
    x_NC, layers = torch.randn(12, 5), [nn.BatchNorm1d(5, affine=False) for _ in range(2)]
    for fused, layer in enumerate(layers):
        convert_batch_norm(layer, views=2, fused=bool(fused))
    torch.testing.assert_close(*(layer(x_NC) for layer in layers))


@pytest.mark.parametrize("other", [{"momentum": None}, {"track_running_stats": False}], ids=str)
def test_a_batchnorm_without_a_moving_average_stays(other):
    norm = convert_batch_norm(nn.BatchNorm1d(5, **other), views=2)
    assert type(norm) is nn.BatchNorm1d


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", "cifar"),
        ("resnet18", "tiny"),
        ("resnet18", "imagenet"),
        pytest.param("resnet50", "cifar", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_fused_branch_is_the_plain_one(name, stem, training):
    found = []
    for fused in (False, True):
        branch = fused_branch(name, fused, stem).train(training)
        z_ND = branch(images(16, torch.float64).flatten(0, 1))[1]
        found.append(results(branch, z_ND))
    assert_equal(found[1], found[0], BUDGET[torch.float64])


@pytest.mark.parametrize("fused", [False, True])
def test_one_value_a_channel_and_half_a_view_are_refused(fused):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        converted(3, fused=fused)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="7 rows do not hold 2 views"):
        converted(3, fused=fused)(torch.randn(7, 3))
    assert len(converted(3, fused=fused).eval()(torch.randn(7, 3))) == 7


def assert_gradients_as_good(ours: Branch, plain: Branch, x_NCHW: Tensor) -> None:
    """Every parameter has one, about as close to float64's as the plain branch's are."""
    plain.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(plain).double()
    exact.precision = torch.float32
    found = []
    for branch, x in ((exact, x_NCHW.double()), (plain, x_NCHW), (ours, x_NCHW)):
        results(branch, branch(x)[1].to(next(branch.parameters()).dtype))
        named = branch.named_parameters()
        found.append({n: p.grad.double() for n, p in named if n != "projector.0.bias"})
    right, theirs, own = found
    assert all(grad.any() for grad in own.values())
    of_plain, of_ours = (
        sum((grads[n] - right[n]).norm() / right[n].norm() for n in right) / len(right)
        for grads in (theirs, own)
    )
    assert of_ours <= 1.5 * of_plain + 1e-4


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", ["cifar", "tiny"])
def test_a_compiled_fused_branch_has_its_gradients(stem, precision):
    """In one graph, two of four stages. torch 2.11 silently loses gradients at some casts."""
    both = [fused_branch("resnet18", fused, stem).float() for fused in (True, False)]
    for branch in both:
        branch.precision = precision
        branch.encoder.layer3, branch.encoder.layer4 = nn.Identity(), nn.Identity()
        branch.projector[0] = nn.Linear(16, 32)
        branch.to(memory_format=torch.channels_last)
    both[0].compile(backend="aot_eager", fullgraph=True)
    assert_gradients_as_good(*both, images(16, torch.float32).flatten(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stem", ["cifar", "tiny"])
def test_a_gpus_branch_has_its_gradients(stem, precision, small_config):
    train = {"precision": precision, "cuda_graph": "on"}
    config = small_config(encoder={"width": 16, "stem": stem}, train=train)
    device = torch.device("cuda")
    ours = build(config, World(0, 1, 0, device), 10).online.branch
    assert ours.encoder.bn1.fused and ours._compiled_call_impl is not None
    plain = Branch(config.encoder, config.projector, ours.precision, 16, stacked=True)
    plain.to(device, memory_format=torch.channels_last)
    x_NCHW = images(16, torch.float32).flatten(0, 1).to(device)
    assert_gradients_as_good(ours, plain, x_NCHW.contiguous(memory_format=torch.channels_last))


def test_a_branch_stacks_views_and_a_target_does():
    batch = Batch(images(16, torch.float32).flatten(0, 1), torch.zeros(8))
    branches = []
    for stacked in (True, False):
        torch.manual_seed(0)
        config = EncoderConfig(stem="cifar", width=8), ProjectorConfig(hidden=32, output=16)
        branches.append(Branch(*config, torch.float32, 16, stacked=stacked))
    one, two = (branch.of_views(batch) for branch in branches)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    # running statistics are updated in view order
    torch.testing.assert_close(*(branch.state_dict() for branch in branches))


def test_a_batchnorm_with_an_activation_stays():
    config = EncoderConfig(name="timm:efficientnet_lite0")
    branch = Branch(config, ProjectorConfig(), torch.float32, 32, stacked=True)
    assert not branch.stacked
    with pytest.raises(UserError, match=r"BatchNormAct2d.*train.batch_norm=local"):
        Branch(config, ProjectorConfig(), torch.float32, 32, synchronised=True)


def _rank(compiled: bool, cases: list[Case], folder: str) -> None:
    """Run one rank on its part of each case's global batch: rows of every view."""
    dist.init_process_group("gloo")
    found = [_share(compiled, *case) for case in cases]
    torch.save(found, f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


def _share(compiled: bool, stem: str, dtype: torch.dtype, training: bool) -> dict[str, Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    net = convert_batch_norm(network(stem, dtype), views=2, synchronised=True).train(training)
    # fuses the stem's pool into its BatchNorm
    _join_relus(net[0])
    target = copy.deepcopy(net).requires_grad_(False)
    x_NCHW = images(STEMS[stem], dtype).chunk(size, dim=1)[rank].flatten(0, 1)
    call = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    z_VBD = call(x_NCHW).unflatten(0, (2, -1))
    weight = torch.linspace(-1, 2, 2 * 8 * 16, dtype=dtype).view(2, 8, 16)
    loss = (z_VBD * weight.chunk(size, dim=1)[rank] + z_VBD.square()).mean()
    loss.backward()
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= size
    found = {f"grad {n}": p.grad for n, p in net.named_parameters() if not n.endswith(LINEAR)}
    found |= dict(net.named_buffers())
    # a rank's own statistics, by torch's kernels and fused
    local = [
        convert_batch_norm(network(stem, dtype), views=2, fused=fused).train(training)
        for fused in (False, True)
    ]
    own = [{"output": one(x_NCHW).detach(), **one.state_dict()} for one in local]
    assert_equal(*own, 2 * BUDGET[dtype])
    return found | {"target": target(x_NCHW), "output": z_VBD.detach().flatten(0, 1)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "compiled", "cases"),
    [
        (2, False, [*product(STEMS, BUDGET, (True, False))]),
        (2, True, [("tiny", torch.float64, True)]),
        (4, False, [("tiny", torch.float64, True)]),
    ],
    ids=["2", "2 compiled", "4"],
)
def test_ranks_equal_one_process(size, compiled, cases, tmp_path):
    codes = forked(_rank, compiled, cases, str(tmp_path), environments=launched(size))
    assert codes == [0] * size
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for case, *shares in zip(cases, *ranks, strict=True):
        stem, dtype, training = case
        one = convert_batch_norm(network(stem, dtype), views=2).train(training)
        whole = results(one, one(images(STEMS[stem], dtype).flatten(0, 1)))
        z_VBD = whole["output"].view(2, 8, 16)
        for rank, found in enumerate(shares):
            share_ND = z_VBD.chunk(size, dim=1)[rank].flatten(0, 1)
            expected = whole | {"output": share_ND, "target": share_ND}
            assert_equal(found, expected, BUDGET[dtype])
