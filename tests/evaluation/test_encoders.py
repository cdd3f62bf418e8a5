"""load_encoder on runs and weight files, against torchvision and timm."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18, resnet50, wide_resnet50_2

import isofast
from isofast.config.schema import EncoderConfig
from isofast.errors import UserError
from isofast.evaluation.encoders import read_encoder, untrained
from isofast.methods.networks import make_encoder
from isofast.methods.weights import initialise
from isofast.training.build import build

from ..support.encoders import write_run
from ..support.runs import ALONE

pytestmark = pytest.mark.slow

MINE = """
from torch import nn

def make():
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(nn.Conv2d(3, 5, 3), *pooled)
    # no classifier, as in some of timm's
    net.add_module("head", nn.BatchNorm1d(5))
    return net
"""
X_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_same_features(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(one(X_BCHW), other.eval()(X_BCHW))


def moved(net: nn.Module) -> nn.Module:
    """Return the network with running statistics that differ from the initial ones."""
    with torch.no_grad():
        for _ in range(3):
            net.train()(1 + 2 * torch.randn(8, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize(
    "encoder",
    [
        {"width": 8, "stem": "cifar", "stem_padding": 2},
        {"name": "resnet34", "width": 4, "stem": "tiny"},
        {"name": "timm:resnet10t"},
        {"name": "my_encoder:make"},
    ],
    ids=lambda encoder: encoder.get("name", "resnet18"),
)
def test_a_run_and_its_file(small, tmp_path, monkeypatch, encoder):
    (tmp_path / "my_encoder.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    settings = small()
    settings["encoder"] = encoder
    trained = write_run(tmp_path / "run", settings)
    before = torch.get_rng_state()
    # whatever the caller's defaults
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            loaded = isofast.load_encoder(tmp_path / "run")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_same_features(loaded, trained)

    (file,) = (tmp_path / "run").glob("checkpoints/*/encoder.safetensors")
    alone = shutil.copy(file, tmp_path / "encoder.safetensors")
    with safe_open(alone, framework="pt") as opened:
        about = opened.metadata()
    assert about["name"] == encoder.get("name", "resnet18")
    assert (about["crop"], json.loads(about["mean"])) == ("16", [0.305] * 3)
    assert_same_features(isofast.load_encoder(str(alone)), trained)
    recipes = [read_encoder(source).recipe for source in (Path(alone), tmp_path / "run")]
    sizes = [(r.crop, r.resize_short, r.mean, r.std) for r in recipes]
    assert sizes[0] == sizes[1] == (16, 16, (0.305,) * 3, (0.376,) * 3)


def test_the_newest_whole_checkpoint_counts(small, tmp_path):
    first = write_run(tmp_path, small(), step=1)
    second = write_run(tmp_path, small(), step=2)
    assert_same_features(isofast.load_encoder(tmp_path), second)
    # nor does an encoder need the run's method, whose module may be elsewhere
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"method": {"name": "no_module:X"}}))
    assert_same_features(isofast.load_encoder(tmp_path), second)
    (tmp_path / "config.json").write_text(json.dumps(config))
    # as an early version wrote it
    third = write_run(tmp_path, small(data={"crop": 12}), step=3, described=False)
    assert_same_features(isofast.load_encoder(tmp_path), third)
    assert read_encoder(tmp_path).recipe.crop == 12
    (tmp_path / "checkpoints" / "step_00000003" / "encoder.safetensors").unlink()
    (tmp_path / "checkpoints" / "step_00000002" / "encoder.safetensors").write_bytes(b"")
    assert_same_features(isofast.load_encoder(tmp_path), first)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        isofast.load_encoder(tmp_path)


def test_checkpoints_of_torchvision_and_timm(tmp_path):
    theirs = moved(resnet18())
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")
    wrapped = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "training.pth")
    save_file(theirs.state_dict(), tmp_path / "saved.safetensors")
    theirs.fc = nn.Identity()
    # MoCo's, solo-learn's and lightly's names, and those of their targets
    for name, online, other in (
        ("moco.pth", "module.encoder_q.", "module.encoder_k."),
        ("solo.ckpt", "backbone.", "momentum_backbone."),
        ("lightly.ckpt", "backbone.", "backbone_momentum."),
        ("first.ckpt", "online.", "momentum."),
    ):
        models: dict[str, nn.Module] = {online: theirs, other: moved(resnet18())}
        if name == "lightly.ckpt":
            models = {p: nn.Sequential(*[*m.children()][:-1]) for p, m in models.items()}
        saved = {f"{p}{n}": x for p, m in models.items() for n, x in m.state_dict().items()}
        heads = (f"{online}{head}.0.weight" for head in ("fc", "classifier", "head", "head_dist"))
        saved |= {name: torch.ones(2) for name in (*heads, "projector.0.weight")}
        torch.save({"state_dict": saved}, tmp_path / name)
        # sorted by name
        save_file(saved, (tmp_path / name).with_suffix(".safetensors"))
    trained = (
        f"{n}.{kind}" for n in ("solo", "lightly", "first") for kind in ("ckpt", "safetensors")
    )
    files = "plain.pth training.pth saved.safetensors moco.pth moco.safetensors"
    for name in (*files.split(), *trained):
        assert_same_features(isofast.load_encoder(tmp_path / name), theirs)
        begun = make_encoder(EncoderConfig())
        initialise(begun, tmp_path / name)
        assert_same_features(begun.eval(), theirs)

    deeper = moved(resnet50())
    torch.save(deeper.state_dict(), tmp_path / "resnet50.pth")
    deeper.fc = nn.Identity()
    assert_same_features(isofast.load_encoder(tmp_path / "resnet50.pth"), deeper)

    # a model that tensor names alone do not identify, as stored on the hub
    hub = tmp_path / "hub"
    model = moved(timm.create_model("resnet10t", num_classes=7))
    timm.models.save_for_hf(model, str(hub), safe_serialization=True)
    model.reset_classifier(0)
    for source in (hub, hub / "model.safetensors"):
        assert_same_features(isofast.load_encoder(source), model)
    card = json.loads((hub / "config.json").read_text())
    card["pretrained_cfg"] |= {"crop_pct": 0.8, "mean": [0.4] * 3, "std": [0.2] * 3}
    (hub / "config.json").write_text(json.dumps(card))
    recipe = read_encoder(hub).recipe
    assert (recipe.crop, recipe.resize_short) == (176, 220)
    assert (recipe.mean, recipe.std) == ((0.4,) * 3, (0.2,) * 3)
    alone = shutil.copy(hub / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"does not say which encoder.*config\.json beside"):
        isofast.load_encoder(alone)
    torch.save({"arch": "resnet10t", "state_dict": load_file(alone)}, tmp_path / "arch.pth")
    assert_same_features(isofast.load_encoder(tmp_path / "arch.pth"), model)
    # PyTorch's ImageNet example names torchvision's
    torch.save({"arch": "resnet18", "model": wrapped}, tmp_path / "arch.pth")
    assert read_encoder(tmp_path / "arch.pth").config.name == "resnet18"


def test_an_untrained_network_is_its_runs_first(small_config):
    config = small_config(seed=7, train={"cuda_graph": "on", "precision": "fp32"})
    before = torch.get_rng_state()
    found = untrained(config).parameters()
    assert torch.equal(torch.get_rng_state(), before)
    first = build(config, ALONE, 10).online.branch.encoder.parameters()
    assert all(torch.equal(*pair) for pair in zip(found, first, strict=True))


def test_files_that_hold_no_encoder_are_refused(tmp_path):
    def refused(name: str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            isofast.load_encoder(tmp_path / name)

    refused("gone.pth", "cannot read the weights .*gone")
    (tmp_path / "half.safetensors").write_bytes(b"\x80" * 20)
    refused("half.safetensors", "cannot read the weights")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "holds list, not a state dict")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    refused("module.pth", "it holds more than tensors.*state dict saved by torch.save")
    torch.save({"stem.weight": torch.ones(3)}, tmp_path / "other.pth")
    refused("other.pth", r"for \(names: stem.weight\)")
    torch.save(wide_resnet50_2().state_dict(), tmp_path / "wide.pth")
    refused("wide.pth", r"of another shape: layer1.0.conv1.weight \(64 x 64 x 1 x 1 here, 128 x")
    (tmp_path / "empty").mkdir()
    refused("empty", "is not a run")
    cifar = make_encoder(EncoderConfig(stem="cifar", width=4))
    torch.save(cifar.state_dict(), tmp_path / "cifar.pth")
    refused("cifar.pth", "3 x 3, and does not say what follows it")
    about = {"name": "resnet18", "stem": "round", "stem_padding": "1", "width": "4", "crop": "9"}
    about |= {"resize_short": "9", "mean": "[0,0,0]", "std": "[1,1,1]"}
    save_file(cifar.state_dict(), tmp_path / "damaged.safetensors", metadata=about)
    refused("damaged.safetensors", "the encoder metadata of .* is damaged: .*stem")


def test_initial_weights_are_the_files(tmp_path):
    theirs = resnet18()
    path = tmp_path / "theirs.pth"
    torch.save(theirs.state_dict(), path)
    same, small_images = (make_encoder(EncoderConfig(stem=s)) for s in ("imagenet", "cifar"))
    assert "first" not in initialise(same, path)
    theirs.fc = nn.Identity()
    assert_same_features(same.eval(), theirs)

    before = small_images.conv1.weight.clone()
    said = initialise(small_images, path)
    assert "is random: conv1.weight (64 x 3 x 3 x 3 here, 64 x 3 x 7 x 7 there)" in said
    assert torch.equal(small_images.conv1.weight, before)
    assert torch.equal(small_images.layer1[0].conv1.weight, theirs.layer1[0].conv1.weight)
    assert torch.equal(small_images.bn1.running_var, theirs.bn1.running_var)

    for config, words in (
        (EncoderConfig(width=16), r"another shape: conv1.weight \(16 x 3 x 7 x 7 here"),
        (EncoderConfig(name="resnet34"), r"missing there: layer1.2.conv1.weight"),
    ):
        encoder = make_encoder(config)
        kept = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        with pytest.raises(UserError, match=f"encoder.init: .*do not fit.*{words}"):
            initialise(encoder, path)
        assert all(torch.equal(kept[name], tensor) for name, tensor in encoder.state_dict().items())
    deeper = tmp_path / "deeper.safetensors"
    save_file(make_encoder(EncoderConfig(name="resnet34")).state_dict(), deeper)
    with pytest.raises(UserError, match=r"unknown here: layer1\.2\.bn1"):
        initialise(make_encoder(EncoderConfig()), deeper)
