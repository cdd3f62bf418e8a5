"""The CUDA-graphed step, called eagerly on a CPU, and torch.compile against eager mode."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from isofast.config.schema import Config
from isofast.data import Batch
from isofast.distributed import World
from isofast.errors import UserError
from isofast.methods import Method
from isofast.methods.ema import EmaTarget
from isofast.methods.networks import Branch
from isofast.run.metrics import read_metrics
from isofast.training.build import TrainState, build, is_graphed
from isofast.training.graph import GraphedStep
from isofast.training.loop import fit
from isofast.training.optim import lr_at, set_lr

from ..support.runs import ALONE, assert_same_run, train


@pytest.mark.long
@pytest.mark.parametrize("method", ["isoloss", "byol"])
def test_a_graphed_run_is_the_plain_one_also_resumed(method, config_file, tmp_path):
    """The plain run uses DeepSpeed's engine; the graphed one bypasses it."""
    config = config_file(method={"name": method, "ema": True})
    plain, graphed = tmp_path / "plain", tmp_path / "graphed"
    train(config, plain)
    on = ("--set", "train.cuda_graph=on")
    train(config, graphed, *on, "--set", "train.max_steps=4")
    assert "continuing from" in train(config, graphed, *on)
    assert_same_run(plain, graphed)


@pytest.mark.parametrize(
    ("device", "sections", "graphed"),
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", {"train": {"cuda_graph": "off"}}, False),
        ("cuda", {"method": {"name": "tests.examples.vicreg:VICReg"}}, False),
        ("cuda", {"encoder": {"name": "my_file:encoder", "width": 64}}, False),
        ("cuda", {"encoder": {"name": "timm:resnet18", "width": 64}}, True),
        # an eigendecomposition syncs with the host, which is not allowed during capture
        ("cuda", {"method": {"name": "directpred", "alpha": 0.25}}, False),
        ("cuda", {"method": {"name": "directpred", "alpha": 0.3, "eps": 0.25}}, False),
        ("cuda", {"method": {"name": "directpred", "alpha": 0.25, "eps": 0.25}}, True),
        ("cuda", {"method": {"name": "directcopy", "metric": "euclidean"}}, True),
    ],
)
def test_a_graph_is_made_of_what_is_known_to_bear_it(device, sections, graphed, small_config):
    config = small_config(**sections)
    assert is_graphed(config, World(0, 1, 0, torch.device(device))) is graphed
    if graphed:
        assert not is_graphed(config, World(0, 2, 0, torch.device(device)))


def test_a_graph_of_several_processes_is_refused(small_config):
    with pytest.raises(UserError, match=r"needs one process and train.accumulation=1, got 2"):
        is_graphed(small_config(train={"cuda_graph": "on"}), World(0, 2, 0, torch.device("cpu")))


def steps(state: TrainState, config: Config, numbers: range) -> list[float]:
    """Take these steps, on batches seeded by their numbers; return the losses."""
    losses = []
    take_step = GraphedStep(state.step, state.world.device)
    for step in numbers:
        generator = torch.Generator().manual_seed(step)
        x_NCHW = torch.randn(16, 3, 16, 16, generator=generator)
        y_B = torch.randint(10, (8,), generator=generator)
        batch = Batch(*(x.to(state.world.device) for x in (x_NCHW, y_B)))
        set_lr(state.optimizer, step, 10, config)
        if state.target is not None:
            state.target.set_decay(step / 40)
        losses.append(take_step(batch).loss.item())
    return losses


def _fused_branch(*arguments: Any, **options: Any) -> Branch:
    """Make the branch that a GPU has."""
    return Branch(*arguments, **options | {"stacked": True, "fused": True})


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "fused", "backend", "networks"),
    [
        ("isoloss", False, "inductor", 2),
        # others without Inductor, which takes minutes
        ("isoloss", True, "aot_eager", 2),
        *(("byol", fused, "aot_eager", 3) for fused in (False, True)),
        *(("simsiam", fused, "aot_eager", 2) for fused in (False, True)),
    ],
)
def test_compiled_networks_train_as_eager_ones_in_one_graph_each(
    method, fused, backend, networks, small_config, monkeypatch
):
    """20 steps with an evaluation's forward pass in between; each network compiles once."""
    if backend != "inductor":
        plain = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda net, **_: plain(net, backend=backend))
    if fused:
        monkeypatch.setattr("isofast.training.build.Branch", _fused_branch)
    losses = {}
    for mode in ("off", "on"):
        ema = {} if method == "simsiam" else {"ema": True, "ema_base": 0.9}
        config = small_config(
            method={"name": method, **ema},
            train={"compile": mode, "cuda_graph": "on", "precision": "fp32"},
        )
        torch._dynamo.reset()
        counters.clear()
        state = build(config, ALONE, classes=10)
        state.online.train()
        losses[mode] = steps(state, config, range(2))
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == (networks if mode == "on" else 0)
        with torch.no_grad():
            state.online.eval()
            state.online.branch.features(torch.zeros(5, 3, 16, 16))
            state.online.train()
        losses[mode] += steps(state, config, range(2, 20))
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert losses["on"] == pytest.approx(losses["off"], rel=2e-4)


@pytest.mark.slow
def test_networks_of_many_sizes_stay_compiled_in_one_process(small_config):
    torch._dynamo.reset()
    counters.clear()
    for hidden in range(8, 80, 8):
        sizes = {"encoder": {"width": 4}, "projector": {"hidden": hidden}}
        config = small_config(**sizes, train={"compile": "on", "cuda_graph": "on"})
        branch = build(config, ALONE, 10).online.branch
        # without Inductor, which takes ten seconds per network
        branch.compile(backend="aot_eager")
        branch(torch.zeros(4, 3, 16, 16))
    assert counters["stats"]["unique_graphs"] == 9


def _pooled() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)


@pytest.mark.slow
def test_recomputation_in_a_gpus_backward_stays_compiled(small_config):
    """The backward runs in another thread, as on a GPU; torch 2.14 sets options by thread."""
    torch._dynamo.reset()
    batch = Batch(torch.randn(16, 3, 8, 8), torch.zeros(8, dtype=torch.int64))
    for hidden in range(8, 64, 8):
        config = small_config(
            encoder={"name": f"{__name__}:_pooled", "width": 64}, projector={"hidden": hidden}
        )
        branch = Branch(config.encoder, config.projector, torch.float32, 8, pieces=2)
        branch.compile(backend="aot_eager")
        # as build does, in this thread
        with torch._dynamo.config.patch(recompile_limit=64):
            loss = torch.stack([z_BD.square().mean() for _, z_BD in branch.of_views(batch)]).sum()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(loss.backward).result()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("method", ["isoloss", "byol"])
def test_a_replayed_step_is_the_eager_one(optimizer, method, small_config):
    device = torch.device("cuda", torch.cuda.current_device())
    losses = {}
    for mode in ("on", "off"):
        config = small_config(
            method={"name": method, "ema": True},
            optimizer={"name": optimizer, "lr": 0.01},
            # learning rates that keep changing after the capture
            train={"compile": "off", "cuda_graph": "on", "epochs": 4},
        )
        state = build(config, World(0, 1, 0, device), classes=10)
        state.online.train()
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        if mode == "on":
            losses[mode] = steps(state, config, range(40))
        else:
            eager = (steps(state, config, range(n, n + 1)) for n in range(40))
            losses[mode] = [loss for (loss,) in eager]
    assert losses["on"] == losses["off"]


@pytest.mark.gpu
def test_compiled_updates_are_the_eager_ones(small_config):
    """LARS and the target's update, which are compiled on a GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    ends = []
    for mode in ("off", "on"):
        train = {"compile": mode, "cuda_graph": "on"}
        config = small_config(method={"ema": True}, optimizer={"name": "lars"}, train=train)
        state = build(config, World(0, 1, 0, device), classes=10)
        assert state.target is not None
        generator = torch.Generator(device).manual_seed(0)
        for step in range(3):
            set_lr(state.optimizer, step, 10, config)
            state.target.set_decay(step / 3)
            for p in state.online.parameters():
                p.grad = torch.empty_like(p).normal_(generator=generator)
            state.optimizer.step()
            state.target.move_(state.online.branch)
        ends.append([*state.online.parameters(), *state.target.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_a_graphed_run_needs_no_deepspeed(small_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    told: dict[str, list[float]] = {"decay": [], "after": []}
    monkeypatch.setattr(EmaTarget, "set_decay", lambda _, progress: told["decay"].append(progress))
    monkeypatch.setattr(Method, "after_step", lambda _, progress: told["after"].append(progress))
    summary = fit(small_config(train={"cuda_graph": "on"}), tmp_path / "run")
    assert summary["completed"] and summary["steps"] == 6
    # of the whole schedule of 44 steps, although the run stops before
    assert told == {name: [step / 44 for step in range(6)] for name in told}
    rates = [record["lr"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    schedule = {"total_steps": 44, "warmup_steps": 4, "warmup_start": 3e-5}
    assert rates == pytest.approx([lr_at(step, 1e-3, **schedule) for step in range(6)])
