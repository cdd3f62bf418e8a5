"""LARS against its formula, parameter groups, schedules, the EMA target's updates."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from isofast.config.load import validate
from isofast.config.presets import merge
from isofast.config.schema import Config
from isofast.methods.ema import EmaTarget, ema_decay
from isofast.methods.foreach import add_scaled_, lerp_
from isofast.training.optim import LARS, load_optimizer_state, lr_at, make_optimizer, set_lr
from isofast.training.step import Online

from ..support.encoders import make_online

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_devices = pytest.mark.parametrize("device", ["cpu", GPU])
OPTIMIZERS = ("lars", "sgd", "adamw")


@pytest.mark.parametrize("one_pass", [True, False], ids=["as on CPUs", "as on GPUs"])
def test_both_forms_of_an_update_follow_its_formula(one_pass):
    torch.manual_seed(0)
    start, others = ([torch.randn(3), torch.randn(2, 5)] for _ in range(2))
    added, moved = ([t.clone() for t in start] for _ in range(2))
    weight = torch.tensor(0.3)
    with _NoSync():
        add_scaled_(added, others, weight, value=-2, one_pass=one_pass)
        lerp_(moved, others, weight, one_pass=one_pass)
    for t, other, one, two in zip(start, others, added, moved, strict=True):
        torch.testing.assert_close(one, t - 0.6 * other)
        torch.testing.assert_close(two, 0.7 * t + 0.3 * other)


def _lars_by_hand(
    p: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float, wd: float, eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step of one tensor, as in the released code."""
    p_norm, g_norm = p.norm(), g.norm()
    if p_norm != 0 and g_norm != 0:
        trust = eta * p_norm / (g_norm + p_norm * wd + 1e-8)
        g = (g + wd * p) * min(trust / lr, torch.tensor(1.0))
    v = 0.9 * v + g
    return p - lr * v, v


@on_devices
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("lr", [1.0, 0.003], ids=["trust-limited", "clipped"])
def test_lars_follows_its_formula(lr, kind, compiled, device):
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.zeros(4, 2), torch.randn(2, 3, 3, 3) * 10, torch.randn(7)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(4)]
    grads[1][0].zero_()
    params = [nn.Parameter(p.to(device, copy=True)) for p in start]
    without = nn.Parameter(torch.ones(3, 3, device=device))
    groups = [
        {"params": [*params[:2], without]},
        {"params": params[2:3], "weight_decay": 5e-2, "eta": 0.1},
        {"params": params[3:], "weight_decay": 3e-2, "adapt": False},
    ]
    # an eta of 1e30 always clips the ratio to 1
    settings = [(lr, 1e-2, 0.02), (lr, 1e-2, 0.02), (lr / 3, 5e-2, 0.1), (lr / 7, 3e-2, 1e30)]
    optimizer = LARS(groups, lr=lr, weight_decay=1e-2, eta=0.02)
    if compiled:
        optimizer.update = torch.compile(optimizer.update, backend="aot_eager", fullgraph=True)
    expected = [(p.double(), torch.zeros_like(p).double()) for p in start]
    for turn, step in enumerate(grads, 1):
        for group, (rate, *_) in zip(optimizer.param_groups, settings[1:], strict=True):
            group["lr"] = kind(rate * turn)
        for p, g in zip(params, step, strict=True):
            p.grad = g.to(device, copy=True)
        optimizer.step()
        expected = [
            _lars_by_hand(p, g.double(), v, rate * turn, *rest)
            for (p, v), g, (rate, *rest) in zip(expected, step, settings, strict=True)
        ]
    for p, g, (q, _) in zip(params, grads[-1], expected, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.float(), rtol=1e-5, atol=1e-6)
        assert p.grad is not None and torch.equal(p.grad.cpu(), g)
    assert (without == 1).all()


def _config(name: str) -> Config:
    """Set peak rates of 1 and 0.1 at this batch size; no value is a default or from a preset."""
    settings = {"name": name, "lr": 0.5, "probe_lr": 0.05, "momentum": 0.8, "weight_decay": 0.03}
    if name == "lars":
        settings["eta"] = 0.05
    train = {"epochs": 100, "batch_size": 512}
    return validate({"data": {"root": "x"}, "optimizer": settings, "train": train})


def _online(method: str = "isoloss") -> Online:
    networks = {"encoder": {"stem": "cifar", "width": 4}, "projector": {"hidden": 8, "output": 8}}
    return make_online(validate({"data": {"root": "x"}, "method": {"name": method}} | networks))


@pytest.mark.parametrize("method", ["isoloss", "byol", "linear"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_cover_every_parameter_once_with_every_setting(name, method):
    online = _online(method)
    optimizer = make_optimizer(online, _config(name))
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(online.parameters()))
    *network, probe = optimizer.param_groups
    assert set(probe["params"]) == set(online.probe.parameters())
    assert [group["peak_lr"] for group in network] == [1.0] * (1 if name == "sgd" else 2)
    assert probe["peak_lr"] == pytest.approx(0.1) and probe["weight_decay"] == 0
    for group in (*network, probe):
        assert group.get("momentum", group.get("betas", (0,))[0]) == 0.8
        assert group.get("eta") == (0.05 if name == "lars" else None)
        assert group.get("betas", (0.8, 0.999))[1] == 0.999
    for group in network:
        for p in group["params"]:
            assert group["weight_decay"] == (0.03 if p.ndim > 1 or name == "sgd" else 0)
            assert group.get("adapt") == (p.ndim > 1 if name == "lars" else None)


def test_learning_rate_at_its_corners():
    def at(step: int) -> float:
        return lr_at(step, 2.0, total_steps=100, warmup_steps=10, warmup_start=0.5)

    assert at(0) == 0.5
    assert at(5) == pytest.approx(1.25)
    assert at(10) == 2.0
    assert at(55) == pytest.approx(1.0)
    assert at(99) == pytest.approx(2.0 * (math.cos(math.pi * 89 / 90) + 1) / 2)
    assert at(100) == at(101) == 0.0
    assert lr_at(5, 2.0, total_steps=5, warmup_steps=5, warmup_start=0.5) == 2.0


def test_every_group_follows_the_schedule():
    optimizer = make_optimizer(_online(), _config("lars"))
    assert set_lr(optimizer, 0, 10, _config("lars")) == pytest.approx(3e-5)
    set_lr(optimizer, 100, 10, _config("lars"))
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([1.0, 1.0, 0.1])
    # a part of an epoch counts, where a run stops does not
    changes = {"schedule": {"warmup_epochs": 2.5}, "train": {"max_steps": 30}}
    part = validate(merge(_config("lars").model_dump(), changes))
    assert set_lr(optimizer, 24, 10, part) == pytest.approx(0.96, abs=1e-3)
    assert set_lr(optimizer, 25, 10, part) == 1.0
    assert set_lr(optimizer, 30, 10, part) > 0.99


def test_target_decay_at_its_corners():
    assert all(ema_decay(0.0, base) == base for base in (0.5, 0.9, 0.97, 0.99, 0.996, 0.999, 1.0))
    assert ema_decay(0.5, 0.99) == pytest.approx(0.995)
    assert ema_decay(1.0, 0.99) == 1.0
    # the last value used, one step before the end
    last = 1 - 0.01 * (math.cos(math.pi * 499 / 500) + 1) / 2
    assert ema_decay(499 / 500, 0.99) == pytest.approx(last, abs=1e-15) != 1.0


@on_devices
def test_target_moves_parameters_and_not_buffers(device):
    online = _online().branch.to(device)
    target = EmaTarget(online, base=0.75)
    before = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
        online.encoder.bn1.running_mean.add_(1.0)
    target.set_decay(1.0)
    target.move_(online)
    assert all(map(torch.equal, before, target.parameters()))
    target.set_decay(0.0)
    target.move_(online)
    for old, new in zip(before, target.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
    assert (target.branch.encoder.bn1.running_mean == 0).all()


class _NoSync(TorchDispatchMode):
    """Raises when the host reads a tensor's value, which would be a sync on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_watch_for_host_reads_sees_one():
    with _NoSync(), pytest.raises(AssertionError):
        torch.ones(()).item()


@on_devices
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_no_tensor_on_the_host(name, device):
    online = _online().to(device)
    optimizer = make_optimizer(online, _config(name))
    for p in online.parameters():
        p.grad = torch.ones_like(p)
    target = EmaTarget(online.branch, base=0.9)
    with _NoSync():
        set_lr(optimizer, 200, 10, _config(name))
        optimizer.step()
        target.set_decay(0.5)
        target.move_(online.branch)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_counts_that_the_tensor_holds(name):
    """A step replayed by a CUDA graph sees new rates only through the tensors it captured."""
    online = _online()
    optimizer = make_optimizer(online, _config(name))
    rates = [group["lr"] for group in optimizer.param_groups]
    set_lr(optimizer, 1000, 10, _config(name))
    load_optimizer_state(optimizer, optimizer.state_dict())
    assert all(g["lr"] is rate for g, rate in zip(optimizer.param_groups, rates, strict=True))
    before = [p.clone() for p in online.parameters()]
    for p in online.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(map(torch.equal, before, online.parameters()))
    rates[0].fill_(0.5)
    optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(before, online.parameters(), strict=True)]
    in_first = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert moved == [id(p) in in_first for p in online.parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_a_captured_step_follows_the_rates(name):
    torch.manual_seed(0)
    config, replayed, eager = _config(name), _online().cuda(), _online().cuda()
    eager.load_state_dict(replayed.state_dict())
    for p, q in zip(replayed.parameters(), eager.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    step, same_step = make_optimizer(replayed, config), make_optimizer(eager, config)
    target, same_target = (EmaTarget(one.branch, base=0.5) for one in (replayed, eager))
    for optimizer in (step, same_step):
        # the first step creates the velocities, and must not be captured
        set_lr(optimizer, 0, 10, config)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.step()
        target.move_(replayed.branch)
    for k in (50, 100, 600):
        for optimizer in (step, same_step):
            set_lr(optimizer, k, 10, config)
        for one in (target, same_target):
            one.set_decay(k / 1000)
        graph.replay()
        same_step.step()
        same_target.move_(eager.branch)
    networks = ((replayed, eager), (target, same_target))
    for one, other in networks:
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_restored_momentum_has_the_strides_of_the_weights():
    """As torch's fused SGD and AdamW require on a GPU."""
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    kept = {"momentum_buffer": state["state"][0]["momentum_buffer"].contiguous()}
    load_optimizer_state(optimizer, state | {"state": {0: kept}})
    restored = optimizer.state[weight]["momentum_buffer"]
    assert restored.stride() == weight.stride() and torch.equal(restored, kept["momentum_buffer"])


def test_a_restored_adamw_keeps_what_depends_on_the_device():
    """A state from a CPU says that no CUDA graph can capture the step."""
    optimizer = AdamW([nn.Parameter(torch.ones(3))], capturable=True)
    (group,) = optimizer.state_dict()["param_groups"]
    state = {"state": {}, "param_groups": [group | {"capturable": False}]}
    load_optimizer_state(optimizer, state)
    assert optimizer.param_groups[0]["capturable"]
