"""What other people's scripts rely on, tried from outside: commands, files, keys, exit codes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torchvision.models import resnet18

from .support.runs import ROOT, call

pytestmark = pytest.mark.slow

TRAIN = str(ROOT / "launch" / "train.py")
STEP_KEYS = {
    *("step", "epoch", "loss", "lr", "probe_loss", "probe_top1", "images_per_s", "data_wait"),
    *("effective_rank", "effective_rank_entropy", "embedding_std", "embedding_norm", "mean_share"),
    *("norm_spread", "alignment", "prediction_norm"),
}


@pytest.fixture
def outside(tmp_path: Path, config_file: Any) -> Path:
    """A folder elsewhere with small.json."""
    config_file(evaluation={"every_epochs": 1, "knn_images": 200}, train={"max_steps": 4})
    return tmp_path


def run(folder: Path, *options: str, code: int = 0) -> str:
    """Train small.json there; return what was printed."""
    command = [sys.executable, TRAIN, "--config", "small.json", *options]
    return call(command, cwd=folder, code=code).stderr


@pytest.mark.long
def test_a_run_and_its_folder(outside):
    run(outside)
    folder = outside / "runs" / "small"
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line.keys() == STEP_KEYS for line in steps)
    (encoder,) = sorted(folder.glob("checkpoints/*/encoder.safetensors"))[-1:]
    weights = load_file(encoder)
    assert weights["bn1.num_batches_tracked"] == 2 * 4
    assert weights.keys() == {k for k in resnet18().state_dict() if k[:3] != "fc."}

    # raising max_steps continues; what changes the result is refused; --fresh deletes nothing
    assert "continuing from" in run(outside, "--set", "train.max_steps=6")
    stored = (folder / "config.json").read_text()
    changes = ("--set", "seed=1", "--set", "optimizer.lr=9", "--set", "train.max_steps=6")
    refused = run(outside, *changes, code=2)
    assert all(word in refused for word in ("seed: 0 -> 1", "optimizer.lr: 0.004 -> 9", "--fresh"))
    assert (folder / "config.json").read_text() == stored
    run(outside, "--set", "seed=1", "--fresh")
    assert len(list((outside / "runs").iterdir())) == 2
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6


def test_python_names(outside):
    code = """
import isofast, torch
from pathlib import Path
from isofast_kernels import (IsoLoss, asymmetric_loss, asymmetric_loss_pair, augment_views,
                             correlation_ema_, matrix_power, second_moment)
config = isofast.load_config(Path("small.json"), ["train.max_steps=1", "evaluation.every_epochs=0"])
summary = isofast.fit(config, Path("python"))
assert summary["completed"] and summary["steps"] == 1
z1, z2 = torch.randn(2, 8, 4, requires_grad=True).unbind()
criterion = IsoLoss(4, alpha=0.5, eps=0.0, decay=0.9, metric="cosine", isotropic=True)
criterion(z1, z2).backward()
assert "corr_DD" in dict(criterion.named_buffers())
"""
    call([sys.executable, "-c", code], cwd=outside)
