"""Whole runs as a user starts them: what they write, killed and continued, with two processes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from isofast.data.prepare import prepare
from isofast.run.checkpoint import newest_checkpoint
from isofast.run.directory import cpu_has_bf16
from isofast.run.metrics import read_metrics

from ..support.runs import ROOT, assert_same_run, started, train

pytestmark = pytest.mark.slow

TINY = ROOT.parent / "shared" / "data" / "tiny-imagenet-20-classes.zip"
Write = Callable[..., Path]


@pytest.fixture
def config(config_file: Write) -> Path:
    """30 steps across an epoch boundary: a checkpoint every 7, an evaluation after each epoch."""
    return config_file(
        train={"max_steps": 30},
        evaluation={"every_epochs": 1, "at_start": True, "knn_images": 200},
        checkpoint={"every_steps": 7},
        logging={"every_steps": 2, "loggers": ["tensorboard"]},
    )


@pytest.mark.long
def test_a_killed_run_ends_as_one_never_killed(config, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    printed = train(config, whole)
    for kill_after in (10, 24):
        victim = started(config, broken, step=kill_after)
        victim.kill()
        victim.communicate()
        assert not (broken / "summary.json").exists()
        # an older summary must not survive in a run that continues
        (broken / "summary.json").write_text("{}")
    # a crash may cut a line short
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')
    again = train(config, broken)
    assert "continuing from" in again and "step_000000" in again
    assert_same_run(whole, broken)

    _check_run_dir(whole, printed)
    # a finished run is left alone
    before = (whole / "metrics.jsonl").read_text()
    assert "completed" in train(config, whole)
    assert (whole / "metrics.jsonl").read_text() == before


def _check_run_dir(run_dir: Path, printed: str) -> None:
    """Check a run's numbers, files and output."""
    summary, environment_json, config = (
        json.loads((run_dir / f"{name}.json").read_text())
        for name in ("summary", "environment", "config")
    )
    assert summary["completed"] is True and summary["steps"] == config["train"]["max_steps"] == 30
    assert summary["epochs"] == pytest.approx(30 / 22, abs=1e-4)
    assert summary["dropped_images_per_epoch"] == 1442 - 22 * 64
    assert all(0 < summary[key] <= 1 for key in ("val_top1", "knn_top1", "knn_top1_initial"))
    assert summary["effective_rank"] > 1 and summary["images_per_s"] > 0 < summary["wall_s"]

    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "knn_top1" in record]
    assert [record["step"] for record in steps] == [*range(2, 31, 2)]
    assert [record["step"] for record in evaluations] == [0, 22, 30]
    label_free = ["rankme", "lidar", "alpha_req", "uniformity", "view_alignment"]
    of_both = {*label_free, *(f"{name}_z" for name in label_free)}
    assert set(evaluations[0]) == {"step", "epoch", "val_top1", "knn_top1", *of_both}
    assert all(np.isfinite(record[name]) for record in evaluations for name in of_both)
    assert summary["knn_top1"] == evaluations[-1]["knn_top1"]
    assert summary["knn_top1_initial"] == evaluations[0]["knn_top1"]
    with np.load(run_dir / "spectrum.npz") as spectrum:
        eigenvalues = spectrum["eigenvalues"]
        assert spectrum["step"].tolist() == [record["step"] for record in steps]
    rank = eigenvalues[-1].sum() ** 2 / np.square(eigenvalues[-1]).sum()
    assert rank == pytest.approx(summary["effective_rank"], rel=1e-4)

    assert environment_json["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment_json["ranks"] == 1 and environment_json["device"]
    assert environment_json["backend"] == "dali"
    assert environment_json["precision"] == ("bfloat16" if cpu_has_bf16() else "float32")
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert checkpoints == ["step_00000028", "step_00000030"]
    assert list((run_dir / "tensorboard").iterdir())
    for text in (f"{summary['knn_top1']:.3f}", str(run_dir / "metrics.jsonl"), "one process"):
        assert text in printed


def test_lost_data_on_one_rank_is_reported_and_written_down(config_file, own_digits, tmp_path):
    config = config_file(data={"root": str(own_digits)}, train={"max_steps": 40})
    run_dir = tmp_path / "run"
    process = started(config, run_dir, ranks=2)
    shutil.rmtree(own_digits / "train" / "4")
    _, printed = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "when the run began" in printed
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["completed"] is False and summary["failure"]


@pytest.mark.long
@pytest.mark.skipif(not TINY.exists(), reason=f"{TINY} is missing")
def test_tinyimagenet_trains_as_shipped(tmp_path):
    """The paper's network and recipe at full width, on real images, through the launcher."""
    root = tmp_path / "tinyimagenet"
    counts = prepare("tinyimagenet", root, TINY)
    assert (counts.classes, counts.train, counts.val) == (20, 10_000, 1_000)
    settings = [f"data.root={root}", "train.max_steps=2", "train.batch_size=8"]
    settings += ["logging.every_steps=1", "evaluation.every_epochs=0"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    train(ROOT / "launch" / "tinyimagenet.json", tmp_path / "run", *overrides, ranks=1)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 2 and all(-4 < loss < 0 for loss in losses)


def test_a_loss_that_blows_up_ends_the_run_and_keeps_the_checkpoint(config_file, tmp_path):
    config = config_file(
        method={"ema": False, "metric": "euclidean", "name": "directpred"},
        optimizer={"name": "sgd", "lr": 1e12},
        schedule={"warmup_epochs": 0.5, "warmup_start": 1e-3},
        train={"max_steps": 20},
        checkpoint={"every_steps": 1, "keep": 30},
    )
    run_dir = tmp_path / "run"
    printed = train(config, run_dir, code=1)
    assert "NaN or infinite" in printed and "optimizer.lr" in printed
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["completed"] is False and "NaN" in summary["failure"]
    online = newest_checkpoint(run_dir / "checkpoints").load()["online"]
    assert all(torch.isfinite(value).all() for value in online.values())


def test_a_run_goes_on_without_its_evaluation_and_with_it_again(config_file, tmp_path):
    config = config_file(evaluation={"every_epochs": 1, "knn_images": 99})
    off = ("--set", "evaluation.every_epochs=0")
    for steps, more in ((1, ()), (2, off), (3, ())):
        train(config, tmp_path / "run", "--set", f"train.max_steps={steps}", *more)


@pytest.mark.parametrize("split", ["train", "val"])
def test_changed_images_are_noticed_on_resume(config_file, own_digits, tmp_path, split):
    evaluation = {"every_epochs": 1, "knn_images": 99}
    data = {"root": str(own_digits)}
    config = config_file(data=data, train={"max_steps": 2}, evaluation=evaluation)
    run_dir = tmp_path / "run"
    train(config, run_dir)
    next((own_digits / split / "0").iterdir()).unlink()
    printed = train(config, run_dir, "--set", "train.max_steps=4", code=2)
    assert "not those that the run started with" in printed
    # and of another class, whose probe has another size
    for folder in ("train", "val"):
        shutil.copytree(own_digits / folder / "1", own_digits / folder / "new")
    printed = train(config, run_dir, "--set", "train.max_steps=4", code=2)
    assert "not those that the run started with" in printed
