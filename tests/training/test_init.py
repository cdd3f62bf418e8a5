"""encoder.init: a run that starts from another run's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from isofast.data import Batch
from isofast.errors import UserError
from isofast.evaluation.encoders import untrained
from isofast.run.metrics import read_metrics
from isofast.training.build import _precision, build, check_version, has_bf16

from ..support.encoders import write_run
from ..support.runs import ALONE, train


@pytest.mark.parametrize("given", ["run", "run/checkpoints/{}/encoder.safetensors"])
def test_encoder_and_target_begin_with_the_file(small, small_config, tmp_path, given):
    write_run(tmp_path / "run", small())
    (path,) = tmp_path.glob("run/checkpoints/*/encoder.safetensors")
    init = str(tmp_path / given.format(path.parent.name))
    # without DeepSpeed's process group
    method, train = {"ema": True, "ema_base": 0.75}, {"cuda_graph": "on", "precision": "bf16"}
    config = small_config(train=train, method=method, encoder={"init": init})
    state = build(config, ALONE, classes=10)
    state.initialise(config.encoder.init)
    wanted = load_file(path)
    for branch in (state.online.branch, state.target.branch):
        for name, tensor in branch.encoder.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
    assert state.online.branch.precision == torch.bfloat16
    state.target.set_decay(0.0)
    assert state.target._weight == 0.25
    # the optimizer updates the parameters that the network uses
    moved = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in moved for p in state.online.branch.encoder.parameters())


def test_the_seed_draws_the_weights(small_config):
    drawn = []
    for seed in (3, 4):
        config = small_config(seed=seed, train={"cuda_graph": "on"})
        before = torch.get_rng_state()
        weights = untrained(config).conv1.weight
        assert torch.equal(torch.get_rng_state(), before)
        # which an evaluation compares with
        assert torch.equal(build(config, ALONE, 10).online.branch.encoder.conv1.weight, weights)
        drawn.append(weights)
    assert not torch.equal(*drawn)


def test_what_has_changed_since_the_checkpoint_is_told(small_config):
    graph = {"cuda_graph": "on", "precision": "fp32"}
    state, other = (
        build(small_config(train=graph, projector={"output": size}), ALONE, classes=10)
        for size in (16, 32)
    )
    found = state.capture()
    check_version(found)
    with pytest.raises(UserError, match="from another version of isofast"):
        check_version(found | {"format": 3})
    drawn = torch.rand(1)
    assert state.restore(found, 1) == []
    # a custom encoder's dropout goes on
    assert torch.rand(1) == drawn
    # whatever "auto" means on this machine
    state.restore(found | {"precision": "bfloat16"}, 1)
    for module in (state.online, state.target):
        assert module.branch.precision == torch.bfloat16
    (note,) = state.restore(found | {"threads": 77}, 1)
    assert "had 77 thread(s) per process" in note
    with pytest.raises(UserError, match=r"of other networks \(size mismatch for \w.*\): the code"):
        other.restore(found, 1)


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_without_bf16_trains_in_fp32(native, small_config, monkeypatch):
    """Cards before Ampere, on which torch emulates it."""

    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert has_bf16(cuda=True) is native
    auto = small_config(train={"precision": "auto"})
    assert (_precision(auto, cuda=True) == torch.bfloat16) is native


def test_a_loss_without_a_gradient_is_refused(small_config):
    state = build(small_config(train={"cuda_graph": "on"}), ALONE, classes=10)
    state.method.loss = lambda views: (views.t1_BD - views.t2_BD).square().mean()
    with pytest.raises(UserError, match="loss has no gradient"):
        state.step(Batch(torch.randn(8, 3, 28, 28), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.long
def test_a_run_goes_on_from_another_and_needs_the_file_once(config_file, tmp_path):
    evaluated = {"every_epochs": 1, "at_start": True, "knn_images": 200}
    config = config_file(evaluation=evaluated)
    first, second = tmp_path / "first", tmp_path / "second"
    train(config, first, "--set", "train.max_steps=12")
    (path,) = first.glob("checkpoints/*12/encoder.safetensors")
    path = path.rename(tmp_path / "begin.safetensors")
    init = ("--set", f"encoder.init={path}")
    assert f"starts with the weights of {path}" in train(config, second, *init)
    ends = []
    for run in (first, second):
        records = read_metrics(run / "metrics.jsonl")
        ends.append([record["knn_top1"] for record in records if "knn_top1" in record])
    # the second run starts where the first one ended
    assert ends[1][0] == ends[0][-1] != ends[0][0]
    assert json.loads((second / "config.json").read_text())["encoder"]["init"] == str(path)

    path.unlink()
    said = train(config, second, *init, "--set", "train.max_steps=8")
    assert "continuing from" in said and "starts with" not in said
    said = train(config, second, *init, "--set", "train.max_steps=99")
    assert "steps 8 to 44" in said and "train.max_steps is beyond the end, 2 epochs" in said
    assert "encoder.init: " in train(config, second, "--set", "train.max_steps=9", code=2)
    assert "encoder.init: cannot read the weights" in train(
        config, tmp_path / "third", *init, code=2
    )
