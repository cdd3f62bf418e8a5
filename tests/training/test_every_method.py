"""Every method from its preset: real runs of a few steps, continued, and what they leave."""

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten_with_path

from isofast.config.load import validate
from isofast.config.schema import Config
from isofast.run.checkpoint import newest_checkpoint
from isofast.run.metrics import read_metrics
from isofast.training.loop import fit

pytestmark = pytest.mark.slow

METHODS = ("isoloss", "directpred", "directcopy", "byol", "simsiam", "linear")
TRAINED = ("byol", "simsiam", "linear")
# what a clock decides
TIMED = ("images_per_s", "data_wait")
# processes that have imported everything already; DeepSpeed allows one run in each
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["isofast.training.loop", "deepspeed"])


def run(config: Config, run_dir: Path) -> None:
    """``fit`` in a process of its own."""
    process = PROCESSES.Process(target=fit, args=(config, run_dir))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == 0


def tensors_of(state: Any) -> dict[str, Any]:
    """The leaves of nested containers, by their place; tensors as lists, so that == compares."""
    leaves, _ = tree_flatten_with_path(state)
    return {
        str(path): leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf
        for path, leaf in leaves
    }


@pytest.fixture(params=METHODS)
def method_run(
    request: pytest.FixtureRequest, small: Callable[..., dict[str, Any]], tmp_path: Path
) -> tuple[Config, Path]:
    """A finished run of four steps, optimizer and all from the method's preset."""
    settings = small(method={"name": request.param}, train={"max_steps": 4})
    del settings["optimizer"]
    config = validate(settings)
    run(config, tmp_path / "whole")
    return config, tmp_path / "whole"


def test_a_run_stopped_and_continued_ends_as_one_never_stopped(
    method_run: tuple[Config, Path], tmp_path: Path
) -> None:
    config, whole = method_run
    _check_records(whole)
    _check_checkpoint(config, whole)

    # what a crash after the fourth step leaves, before its checkpoint is written
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step_00000004")
    run(config, broken)
    records = [
        [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(d / "metrics.jsonl")]
        for d in (whole, broken)
    ]
    assert records[0] == records[1]
    with np.load(whole / "spectrum.npz") as a, np.load(broken / "spectrum.npz") as b:
        assert np.array_equal(a["eigenvalues"], b["eigenvalues"])
    states = []
    for folder in (whole, broken):
        found = newest_checkpoint(folder / "checkpoints")
        assert found is not None and found.step == 4
        state = found.load()
        del state["totals"]
        states.append(tensors_of(state))
    assert states[0] == states[1]


def _check_records(run_dir: Path) -> None:
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert all(value is not None for value in record.values())
        assert -1 <= record["alignment"] <= 1 and record["effective_rank"] >= 1
    with np.load(run_dir / "spectrum.npz") as spectrum:
        assert spectrum["eigenvalues"].shape == (4, 16)
        assert (
            np.isfinite(spectrum["eigenvalues"]).all() and (spectrum["eigenvalues"][:, 0] > 0).all()
        )


def _check_checkpoint(config: Config, run_dir: Path) -> None:
    """A trained predictor is saved with the online network, has moved, and is nowhere else."""
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
