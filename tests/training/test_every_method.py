"""Every method with its preset: real runs of a few steps, continued, and what they write."""

import gc
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from isofast.config.load import validate
from isofast.config.presets import METHODS
from isofast.config.schema import Config, MethodConfig, ProjectorConfig
from isofast.errors import UserError
from isofast.methods import Method, Views
from isofast.run.metrics import read_metrics
from isofast.training.loop import fit

from ..support.runs import assert_same_run, fit_apart, forked, launched

pytestmark = pytest.mark.slow

TRAINED = ("byol", "simsiam", "linear")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_stopped_and_continued_ends_as_one_never_stopped(name, small, tmp_path):
    settings = small(method={"name": name}, train={"max_steps": 4})
    # use the preset's optimizer
    del settings["optimizer"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit_apart(settings, whole)
    _check_records(whole)
    _check_checkpoint(validate(settings), whole)

    # as left by a crash after the fourth step, before its checkpoint was written
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step_00000004")
    fit_apart(settings, broken)
    assert_same_run(whole, broken)


@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_train_one_run_after_the_other(ranks, small, tmp_path):
    runs = tmp_path / "one", tmp_path / "two"
    fit_apart(small(train={"max_steps": 2}), *runs, ranks=ranks)
    assert_same_run(*runs)


def test_runs_of_one_process_leave_nothing_open(small, tmp_path):
    (only,) = launched(1)
    assert forked(_fit_thrice, small(train={"max_steps": 1}), tmp_path, environments=[only]) == [0]


def _fit_thrice(settings: dict[str, Any], folder: Path) -> None:
    process, counts, hook = psutil.Process(), [], sys.excepthook
    for name in "abc":
        fit(validate(settings), folder / name)
        counts.append((process.num_fds(), process.num_threads()))
        left = {type(one).__name__ for one in gc.get_objects()}
        assert not left & {"DeepSpeedEngine", "TrainLoader", "EvalLoader"}
    assert counts[0] == counts[1] == counts[2], counts
    assert sys.excepthook is hook


def test_runs_in_two_threads_are_refused(small, tmp_path):
    (only,) = launched(1)
    assert forked(_fit_twice, small(train={"max_steps": 1}), tmp_path, environments=[only]) == [0]


def _fit_twice(settings: dict[str, Any], folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(fit, validate(settings), folder / name) for name in "ab"]
        errors = [run.exception() for run in runs]
    (refused,) = [error for error in errors if error is not None]
    assert isinstance(refused, UserError) and "another thread is training" in str(refused)


def test_a_process_group_of_yours_stays(small, tmp_path):
    settings = small(train={"max_steps": 1, "batch_norm": "local"})
    assert forked(_fit_in_a_group, settings, tmp_path, environments=launched(2)) == [0, 0]


def _fit_in_a_group(settings: dict[str, Any], folder: Path) -> None:
    dist.init_process_group("gloo")
    with mock.patch("isofast.training.loop.mean_of_statistics_over_ranks_") as averaged:
        fit(validate(settings), folder)
    averaged.assert_called_once()
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_several_ranks_average_gradients(ranks, small, tmp_path):
    settings = small(train={"max_steps": 1})
    environments = launched(ranks)
    assert forked(_fit_and_average, settings, tmp_path, environments=environments) == [0] * ranks


def _fit_and_average(settings: dict[str, Any], folder: Path) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    bucket = DeepSpeedEngine.allreduce_bucket
    with mock.patch.object(
        DeepSpeedEngine, bucket.__name__, autospec=True, side_effect=bucket
    ) as averaged:
        fit(validate(settings), folder)
    assert averaged.called == (os.environ["WORLD_SIZE"] == "2")


class Scaled(Method):
    """A custom method that learns a scalar, and records it under names that are taken."""

    def __init__(self, config: MethodConfig, projector: ProjectorConfig) -> None:
        super().__init__(config, projector)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def loss(self, views: Views) -> Tensor:
        return (self.scale * views.z1_BD - views.t2_BD).square().mean()

    def scalars(self) -> dict[str, Tensor]:
        return dict.fromkeys(("step", "loss", "scale"), self.scale.detach())


def test_a_method_of_your_own_may_learn_a_scalar(small, tmp_path):
    method = {"name": f"{__name__}:Scaled"}
    fit_apart(small(method=method, train={"max_steps": 2}), tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "step_00000002" / "state.pt", weights_only=True)
    assert state["online"]["method.scale"].shape == () and state["online"]["method.scale"] != 1
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["scale"] == pytest.approx(1, abs=0.01) != records[0]["loss"]


def _check_records(run_dir: Path) -> None:
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert all(value is not None for value in record.values())
        assert -1 <= record["alignment"] <= 1 and record["effective_rank"] >= 1
    with np.load(run_dir / "spectrum.npz") as spectrum:
        assert spectrum["eigenvalues"].shape == (4, 16)
        assert np.isfinite(spectrum["eigenvalues"]).all()
        assert (spectrum["eigenvalues"][:, 0] > 0).all()


def _check_checkpoint(config: Config, run_dir: Path) -> None:
    """Check that a trained predictor is saved with the online network alone, and has changed."""
    first, last = (
        torch.load(run_dir / "checkpoints" / f"step_0000000{step}" / "state.pt", weights_only=True)
        for step in (2, 4)
    )
    names = [name for name in last["online"] if "predictor" in name]
    assert bool(names) == (config.method.name in TRAINED)
    for name in names:
        assert not torch.equal(first["online"][name], last["online"][name]), name
    assert (last["target"] is None) == (not config.method.ema)
    elsewhere = [*(last["target"] or {})]
    elsewhere += load_file(run_dir / "checkpoints" / "step_00000004" / "encoder.safetensors")
    assert elsewhere and not [name for name in elsewhere if "predictor" in name]
