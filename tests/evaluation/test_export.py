"""`isofast export`: each format read by its own library."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

import isofast
from isofast.cli import main
from isofast.evaluation.encoders import read_encoder

from ..support.encoders import write_run

pytestmark = pytest.mark.slow

MEAN = [0.485, 0.456, 0.406]
X_BCHW = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def export(source: Path, kind: str, output: Path) -> int:
    return main(["export", str(source), "--format", kind, "--output", str(output)])


def features(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(X_BCHW)


@pytest.fixture
def run_of(small: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """A run of some encoder for 32-pixel images, and its features of X_BCHW."""

    def make(**encoder: Any) -> tuple[Path, torch.Tensor]:
        settings = small(data={"dataset": "imagefolder", "crop": 32}) | {"encoder": encoder}
        return tmp_path / "run", features(write_run(tmp_path / "run", settings))

    return make


@pytest.mark.parametrize(
    ("encoder", "file"),
    [
        ({"stem": "imagenet"}, "net.pth"),
        ({"stem": "cifar", "stem_padding": 2}, "net.pth"),
        ({"name": "resnet34", "stem": "tiny", "width": 4}, "net.pth"),
        ({"stem": "imagenet", "width": 8}, "net.safetensors"),
    ],
    ids=["imagenet", "cifar", "narrow-tiny", "narrow-imagenet"],
)
def test_the_printed_lines_build_torchvisions_network(run_of, tmp_path, capsys, encoder, file):
    run, expected = run_of(**encoder)
    assert export(run, "torchvision", tmp_path / file) == 0
    names: dict[str, Any] = {}
    printed = capsys.readouterr().out
    exec(printed, names)
    assert (
        "# x: (B, 3, 32, 32) float32, (pixels / 255 - mean) / std with mean (0.485, 0.456, 0.406)"
        in printed
    )
    assert "std (0.229, 0.224, 0.225)" in printed
    assert names["net"].bn1.num_batches_tracked > 0
    assert torch.equal(features(names["net"]), expected)


@pytest.mark.parametrize("file", ["net.pth", "net.safetensors"])
def test_a_timm_checkpoint(run_of, tmp_path, file):
    run, expected = run_of(stem="imagenet")
    assert export(run, "timm", tmp_path / file) == 0
    # loads strictly
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / file))
    torch.testing.assert_close(features(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoder", [{"stem": "imagenet"}, {"name": "timm:resnet10t"}])
def test_a_hugging_face_folder(run_of, tmp_path, encoder):
    run, expected = run_of(**encoder)
    folder = tmp_path / "hub"
    assert export(run, "huggingface", folder) == 0
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    torch.testing.assert_close(features(model), expected, rtol=1e-5, atol=1e-5)
    images = timm.data.resolve_data_config({}, model=model)
    assert images["input_size"] == (3, 32, 32) and images["interpolation"] == "bicubic"
    assert (list(images["mean"]), list(images["std"])) == (MEAN, [0.229, 0.224, 0.225])
    # clean images are 37 pixels before the crop
    assert images["crop_pct"] == 32 / 37
    written = json.loads((folder / "config.json").read_text())
    # transformers passes it itself
    assert "num_classes" not in written.get("model_args", {})
    card = written["pretrained_cfg"]
    assert not {"tag", "license", "origin_url", "url", "hf_hub_id"} & card.keys()
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert torch.equal(features(isofast.load_encoder(folder)), features(model))
    # nothing is overwritten
    assert export(run, "huggingface", folder) == 2


@pytest.mark.parametrize("kind", ["torchvision", "huggingface"])
def test_a_full_disk_is_named(run_of, small_disk, capsys, kind):
    run, _ = run_of(stem="imagenet")
    assert export(run, kind, small_disk / "net.pth") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not any(small_disk.iterdir())


def test_safetensors_come_back(run_of, tmp_path):
    run, expected = run_of(stem="tiny", width=4)
    assert export(run, "safetensors", tmp_path / "one.safetensors") == 0
    assert export(tmp_path / "one.safetensors", "safetensors", tmp_path / "two.safetensors") == 0
    assert torch.equal(features(isofast.load_encoder(tmp_path / "two.safetensors")), expected)
    recipe = read_encoder(tmp_path / "two.safetensors").recipe
    assert (recipe.crop, recipe.resize_short, [*recipe.mean]) == (32, 37, MEAN)


@pytest.mark.parametrize("encoder", [{"stem": "cifar", "width": 4}, {"name": "timm:resnet10t"}])
def test_onnx_of_any_batch(run_of, tmp_path, capsys, encoder):
    import onnxruntime

    run, expected = run_of(**encoder)
    path = tmp_path / "net.onnx"
    assert export(run, "onnx", path) == 0
    assert "differ from torch's by" in capsys.readouterr().out
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert json.loads(about["mean"]) == MEAN and about["crop"] == "32"
    batch, *rest = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and [dim.dim_value for dim in rest] == [3, 32, 32]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        (h_BF,) = session.run(None, {"x": X_BCHW[:count].numpy()})
        np.testing.assert_allclose(h_BF, expected[:count], rtol=1e-4, atol=1e-4)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "net.onnx"}


def test_onnx_that_computes_something_else_is_not_written(run_of, tmp_path, monkeypatch):
    run, _ = run_of(stem="cifar", width=4)
    monkeypatch.setattr("isofast.evaluation.export._ONNX_TOLERANCE", 0.0)
    (tmp_path / "net.onnx").write_bytes(b"earlier")
    assert export(run, "onnx", tmp_path / "net.onnx") == 1
    monkeypatch.setattr("isofast.evaluation.export._ONNX_TOLERANCE", 1.0)
    nan = [np.full((1, 1), np.nan, np.float32)]
    monkeypatch.setattr("onnxruntime.InferenceSession.run", lambda *_: nan)
    assert export(run, "onnx", tmp_path / "net.onnx") == 1
    assert (tmp_path / "net.onnx").read_bytes() == b"earlier"


def test_what_a_format_cannot_hold_is_said(run_of, tmp_path, refused, monkeypatch):
    run, _ = run_of(name="timm:resnet10t")
    net = tmp_path / "net.pth"
    refused(["export", run, "--format", "torchvision", "--output", net], "not one of torchvision's")
    run, _ = run_of(stem="cifar", width=4)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for kind, output, words in (
        ("timm", "x.pth", "stem cifar and width 4"),
        ("huggingface", "hub", "needs encoder.stem=imagenet and encoder.width=64"),
        ("onnx", "x.onnx", "needs onnxscript: pip install --upgrade onnxscript"),
        ("safetensors", "no/x.safetensors", "create it first"),
        ("safetensors", "run", "run is a folder; give a file"),
        ("safetensors", "x.pth", "must end in .safetensors"),
    ):
        refused(["export", run, "--format", kind, "--output", tmp_path / output], words)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
