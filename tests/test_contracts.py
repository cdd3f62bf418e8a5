"""What users' scripts rely on, tested from outside: commands, files, keys, exit codes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torchvision.models import resnet18

from .support.runs import ISOFAST, ROOT, call

pytestmark = pytest.mark.slow

TRAIN = str(ROOT / "launch" / "train.py")
STEP_KEYS = {
    *("step", "epoch", "loss", "lr", "probe_loss", "probe_top1", "images_per_s", "data_wait"),
    *("effective_rank", "effective_rank_entropy", "embedding_std", "embedding_norm", "mean_share"),
    *("norm_spread", "alignment", "prediction_norm"),
}
SUMMARY_KEYS = {
    *("completed", "epochs", "steps", "val_top1", "knn_top1", "effective_rank"),
    *("images_per_s", "wall_s"),
}
MINE = """
from isofast.methods import Method


class MyMethod(Method):
    class Config(Method.Config):
        pull: float = 1.0

    def loss(self, views):
        return self.config.pull * (views.z1_BD - views.t2_BD).pow(2).mean()

    def scalars(self):
        return {"pull": self.correlation.corr_DD.new_tensor(self.config.pull)}
"""


@pytest.fixture
def outside(tmp_path: Path, small: Any) -> Path:
    """A folder outside the repository with a config and a custom method."""
    changes = {"evaluation": {"every_epochs": 1, "knn_images": 200}, "train": {"max_steps": 4}}
    (tmp_path / "tiny.json").write_text(json.dumps(small(**changes)))
    (tmp_path / "my_file.py").write_text(MINE)
    return tmp_path


def run(folder: Path, *options: str, code: int = 0) -> str:
    """Train tiny.json in ``folder``; return its stderr."""
    command = [sys.executable, TRAIN, "--config", "tiny.json", *options]
    return call(command, cwd=folder, code=code).stderr


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_run_and_its_folder(outside):
    run(outside)
    folder = outside / "runs" / "tiny"
    names = ("config.json", "environment.json", "metrics.jsonl", "spectrum.npz", "checkpoints")
    assert all((folder / name).exists() for name in (*names, "summary.json"))
    steps = [line for line in lines_of(folder) if "loss" in line]
    evaluations = [line for line in lines_of(folder) if "knn_top1" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line.keys() == STEP_KEYS for line in steps)
    assert evaluations[-1].keys() >= {"step", "epoch", "val_top1", "knn_top1"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["completed"] is True and summary["steps"] == 4
    assert 0 <= summary["knn_top1"] <= 1
    with np.load(folder / "spectrum.npz") as spectrum:
        count, features = spectrum["eigenvalues"].shape
        assert spectrum["step"].shape == (count,) and features == 16
        assert (np.diff(spectrum["eigenvalues"], axis=1) <= 0).all()
    (encoder,) = sorted(folder.glob("checkpoints/*/encoder.safetensors"))[-1:]
    weights = load_file(encoder)
    assert weights["bn1.num_batches_tracked"] == 2 * 4
    assert weights.keys() == {k for k in resnet18().state_dict() if k[:3] != "fc."}

    # raising max_steps continues; what would change results is refused; --fresh deletes nothing
    assert "continuing from" in run(outside, "--set", "train.max_steps=6")
    stored = (folder / "config.json").read_text()
    changes = ("--set", "seed=1", "--set", "optimizer.lr=9", "--set", "train.max_steps=6")
    refused = run(outside, *changes, "--set", "train.epochs=999", code=2)
    words = ("seed: 0 -> 1", "optimizer.lr: 0.004 -> 9", "--fresh", "encoder.init=runs/tiny")
    assert all(word in refused for word in words)
    assert (folder / "config.json").read_text() == stored
    run(outside, "--set", "seed=1", "--fresh")
    assert len(list((outside / "runs").iterdir())) == 2
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6


@pytest.mark.long
def test_a_method_in_a_file_of_ones_own(outside):
    mine = ("--run-dir", "mine", "--set", "method.name=my_file:MyMethod", "--set", "method.pull=2")
    run(outside, *mine)
    assert "continuing from" in run(outside, *mine, "--set", "train.max_steps=6")
    lines = lines_of(outside / "mine")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert all(line["pull"] == 2 for line in lines if "loss" in line)
    assert any("knn_top1" in line for line in lines)
    wrong = run(outside, *mine[:4], "--set", "method.push=2", code=2)
    assert "method.push" in wrong and "pull" in wrong


@pytest.mark.long
def test_prepare_is_idempotent_and_prints_counts(tmp_path):
    command = [*ISOFAST, "prepare", "digits", "--root", "digits"]
    counts = "10 classes, 1,442 train and 355 val images"
    assert counts in call(command, cwd=tmp_path).stdout
    assert counts in call(command, cwd=tmp_path).stdout
    wrong = [*ISOFAST, "prepare", "cifar10", "--root", "c", "--archive", "no.tar"]
    call(wrong, cwd=tmp_path, code=2)
    assert not any((tmp_path / "c").iterdir())


def test_theory_prints_json_alone(tmp_path):
    command = [*ISOFAST, "theory", "simulate", "--loss", "iso_cosine", "--steps", "5", "--json"]
    printed = json.loads(call(command, cwd=tmp_path).stdout)
    assert printed.keys() >= {"loss", "initial", "final", "trace"}
    assert printed["final"] == sorted(printed["final"], reverse=True)
    assert len(printed["trace"]) == 2


def test_python_names(outside):
    code = """
import isofast, torch
from pathlib import Path
from isofast_kernels import (IsoLoss, asymmetric_loss, asymmetric_loss_pair, augment_views,
                             correlation_ema_, matrix_power, second_moment)
config = isofast.load_config(Path("tiny.json"), ["train.max_steps=1", "evaluation.every_epochs=0"])
summary = isofast.fit(config, Path("python"))
assert summary["completed"] and summary["steps"] == 1
z1, z2 = torch.randn(2, 8, 4, requires_grad=True).unbind()
criterion = IsoLoss(4, alpha=0.5, eps=0.0, decay=0.9, metric="cosine", isotropic=True)
criterion(z1, z2).backward()
assert "corr_DD" in dict(criterion.named_buffers())
"""
    call([sys.executable, "-c", code], cwd=outside)
