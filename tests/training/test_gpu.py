"""The same code on a GPU: views against the CPU's, and an end-to-end run."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isofast.data import Batch, ImageFolder, Recipe, TrainLoader, recipe_for
from isofast.run.metrics import read_metrics

from ..data.conftest import checked, eval_loader
from ..support.runs import call, command_of, train

pytestmark = pytest.mark.gpu


@pytest.fixture
def images(digits: Path) -> ImageFolder:
    return checked(digits)


def loader_on(device: str, backend: str, images: ImageFolder, recipe: Recipe) -> TrainLoader:
    kind: dict[str, Any] = {"batch_size": 64, "seed": 3, "threads": 2}
    return TrainLoader(backend, images, recipe, device=torch.device(device), **kind)


def differences(on_cpu: Batch, on_gpu: Batch, recipe: Recipe) -> Sequence[torch.Tensor]:
    """Return each view's pixel distances in 8-bit levels, after checking labels and layout."""
    assert torch.equal(on_cpu.y_B, on_gpu.y_B.cpu())
    levels = 255 * torch.tensor(recipe.std).view(-1, 1, 1)
    assert on_gpu.x_NCHW.is_contiguous(memory_format=torch.channels_last)
    return ((on_cpu.x_NCHW - on_gpu.x_NCHW.cpu()).abs() * levels).chunk(2)


def test_dali_makes_the_same_views_on_both_devices(images):
    pytest.importorskip("nvidia.dali")
    recipe = recipe_for("digits")
    loaders = [loader_on(device, "dali", images, recipe) for device in ("cpu", "cuda")]
    for _ in range(3):
        for difference in differences(*map(next, loaders), recipe):
            # resampling and rounding differ slightly between the two
            assert difference.mean() < 1.5
    for loader in loaders:
        loader.close()


def test_dali_decodes_jpegs_as_on_the_cpu(tmp_path):
    """Sharp colours with halved chroma; clean images are only decoded and resized."""
    pytest.importorskip("nvidia.dali")
    generator = np.random.default_rng(0)
    folder = tmp_path / "unlabeled"
    folder.mkdir()
    for k in range(64):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.NEAREST).save(
            folder / f"{k}.jpg", quality=95, subsampling="4:2:0"
        )
    images = checked(tmp_path)
    recipe = recipe_for("imagefolder", crop=64)
    levels = 255 * torch.tensor(recipe.std).view(-1, 1, 1)
    made = []
    for device in ("cpu", "cuda", "cuda"):
        where = torch.device(device)
        ((x_BCHW, _),) = eval_loader(images, recipe, range(64), batch_size=64, device=where)
        made.append(x_BCHW.cpu() * levels)
    on_cpu, on_gpu, again = made
    # without smooth chroma upsampling they differ by 7 levels
    assert (on_cpu - on_gpu).abs().mean() < 1.5
    assert torch.equal(on_gpu, again)


def test_resident_views_are_the_cpu_s_reference(images):
    """8 x 8 digits under the CIFAR-10 recipe, for which auto chooses the resident backend."""
    recipe = recipe_for("cifar10", crop=24)
    kinds = (("cpu", "resident"), ("cuda", "auto"))
    loaders = [loader_on(device, backend, images, recipe) for device, backend in kinds]
    assert all(loader.backend == "resident" for loader in loaders)
    for _ in range(40):
        for difference in differences(*map(next, loaders), recipe):
            # a filter summed in another order occasionally rounds to another level
            assert (difference > 0.5).float().mean() < 5e-3
            assert difference.mean() < 0.05
    for loader in loaders:
        loader.close()


def test_making_resident_batches_waits_for_nothing(images):
    loader = loader_on("cuda", "resident", images, recipe_for("cifar10", crop=24))
    next(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            next(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loader.close()


STILL = {
    "degrees": 0.0,
    "translate": 0.0,
    "scale": (1.0, 1.0),
    "shear": 0.0,
    "crop_scale": (0.5, 1),
}
RESIDENT = {"backend": "resident", "augmentation": {"view1": STILL, "view2": STILL}}


def test_a_run_from_end_to_end(config_file, tmp_path):
    config = config_file(
        data=RESIDENT,
        train={"max_steps": 12, "compile": "off"},
        evaluation={"every_epochs": 1, "knn_images": 200},
    )
    run_dir = tmp_path / "run"
    call(command_of(config, run_dir), CUDA_VISIBLE_DEVICES="0")
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]
    assert len(records) == 12 and all(r["loss"] is not None for r in records)
    assert json.loads((run_dir / "environment.json").read_text())["cuda"]
    assert json.loads((run_dir / "summary.json").read_text())["completed"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_goes_to_the_gpu_and_back(config_file, tmp_path, optimizer):
    config = config_file(
        data=RESIDENT,
        optimizer={"name": optimizer},
        train={"max_steps": 12, "compile": "off", "precision": "fp32"},
    )
    stays, moves = tmp_path / "stays", tmp_path / "moves"
    train(config, stays)
    train(config, moves, "--set", "train.max_steps=4")
    longer = command_of(config, moves, "--set", "train.max_steps=8")
    there = call(longer, CUDA_VISIBLE_DEVICES="0").stderr
    back = train(config, moves)
    assert "the run was on a cpu and is on a cuda now" in there
    assert "the run was on a cuda and is on a cpu now" in back
    one, other = (read_metrics(run_dir / "metrics.jsonl") for run_dir in (stays, moves))
    assert [r["step"] for r in other] == [r["step"] for r in one] == list(range(1, 13))
    assert [r["loss"] for r in other[:4]] == [r["loss"] for r in one[:4]]
    for a, b in zip(one, other, strict=True):
        # losing the momentum, C or the target would change them by more than TF32 does
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)


def test_a_gpu_without_memory(config_file, tmp_path):
    """torch's own memory limit stands in for a GPU shared with others."""
    limited = "import sys, torch; from isofast import cli; "
    limited += "torch.cuda.set_per_process_memory_fraction(1e-4); "
    limited += "sys.exit(cli.main(['train', *sys.argv[1:]]))"
    arguments = ["--config", str(config_file(data=RESIDENT)), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-c", limited, *arguments]
    printed = call(command, code=1, CUDA_VISIBLE_DEVICES="0").stderr
    assert "the GPU is out of memory" in printed and "train.batch_size" in printed
