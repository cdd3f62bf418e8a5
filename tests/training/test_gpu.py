"""The same code on a GPU: DALI's views against the CPU's, a run from end to end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isofast.data import check_folder, make_train_loader, open_dataset, recipe_for
from isofast.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_dali_makes_the_same_views_on_both_devices(digits: Path) -> None:
    dataset = check_folder(open_dataset(digits, "train"), progress=False)
    recipe = recipe_for("digits")
    batches = {}
    for device in ("cpu", "cuda"):
        loader = make_train_loader(
            "dali",
            dataset,
            recipe,
            batch_size=64,
            seed=3,
            device=torch.device(device),
            threads=2,
        )
        batches[device] = [next(loader) for _ in range(3)]
        loader.close()
    for on_cpu, on_gpu in zip(batches["cpu"], batches["cuda"], strict=True):
        assert torch.equal(on_cpu.y_B, on_gpu.y_B.cpu())
        for cpu_BCHW, gpu_BCHW in ((on_cpu.x1_BCHW, on_gpu.x1_BCHW), (on_cpu[1], on_gpu[1])):
            assert gpu_BCHW.is_contiguous(memory_format=torch.channels_last)
            # in 8-bit levels; resampling and rounding differ a little between the two
            levels = (cpu_BCHW - gpu_BCHW.cpu()).abs().mean().item() * 255 * recipe.std[0]
            assert levels < 1.5


def test_resident_views_are_the_cpu_s_reference(digits: Path) -> None:
    """Stored 8 x 8 digits under the CIFAR-10 recipe; auto takes the resident backend here."""
    dataset = check_folder(open_dataset(digits, "train"), progress=False)
    recipe = recipe_for("cifar10", crop=24)
    batches = {}
    for backend, device in (("resident", "cpu"), ("auto", "cuda")):
        loader = make_train_loader(
            backend, dataset, recipe, batch_size=64, seed=3, device=torch.device(device), threads=2
        )
        assert loader.backend == "resident"
        batches[device] = [next(loader) for _ in range(40)]
        loader.close()
    levels = 255 * torch.tensor(recipe.std).view(3, 1, 1)
    for on_cpu, on_gpu in zip(batches["cpu"], batches["cuda"], strict=True):
        assert torch.equal(on_cpu.y_B, on_gpu.y_B.cpu())
        for cpu_BCHW, gpu_BCHW in ((on_cpu.x1_BCHW, on_gpu.x1_BCHW), (on_cpu[1], on_gpu[1])):
            assert gpu_BCHW.is_contiguous(memory_format=torch.channels_last)
            difference = (cpu_BCHW - gpu_BCHW.cpu()).abs() * levels
            # a filter's sum in another order rounds to another level now and then
            assert (difference > 0.5).float().mean() < 5e-3
            assert difference.mean() < 0.05


def test_making_resident_batches_waits_for_nothing(digits: Path) -> None:
    dataset = check_folder(open_dataset(digits, "train"), progress=False)
    loader = make_train_loader(
        "resident",
        dataset,
        recipe_for("cifar10", crop=24),
        batch_size=64,
        seed=3,
        device=torch.device("cuda"),
        threads=2,
    )
    next(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            next(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loader.close()


def test_a_run_from_end_to_end(config_file: Callable[..., Path], tmp_path: Path) -> None:
    config = config_file(
        train={"max_steps": 12, "compile": "off"},
        evaluation={"every_epochs": 1, "knn_images": 200},
    )
    run_dir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config)]
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"},
    )
    assert done.returncode == 0, done.stderr
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]
    assert len(records) == 12 and all(r["loss"] is not None for r in records)
    assert json.loads((run_dir / "environment.json").read_text())["cuda"]
    assert json.loads((run_dir / "summary.json").read_text())["completed"]
