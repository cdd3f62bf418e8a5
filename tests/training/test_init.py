"""encoder.init: a run that starts from another run's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from isofast.run.metrics import read_metrics
from isofast.training.build import build

from ..support.encoders import write_run
from ..support.runs import ALONE, train


def test_encoder_and_target_begin_with_the_file(small, small_config, tmp_path):
    write_run(tmp_path / "run", small())
    (path,) = tmp_path.glob("run/checkpoints/*/encoder.safetensors")
    # without DeepSpeed's process group
    config = small_config(
        train={"cuda_graph": "on"}, method={"ema": True}, encoder={"init": str(path)}
    )
    state = build(config, ALONE, classes=10)
    state.initialise(config.encoder.init)
    wanted = load_file(path)
    for branch in (state.online.branch, state.target.branch):
        for name, tensor in branch.encoder.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
    # the optimizer updates the parameters that the network uses
    moved = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in moved for p in state.online.branch.encoder.parameters())


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
    assert "encoder.init: " in train(config, second, "--set", "train.max_steps=9", code=2)
    assert "encoder.init: cannot read the weights" in train(
        config, tmp_path / "third", *init, code=2
    )
