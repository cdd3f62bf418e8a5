"""Stems, widths and names of the networks."""

import sys
import types

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from isofast.config.schema import EncoderConfig, ProjectorConfig
from isofast.data import Batch
from isofast.errors import UserError
from isofast.methods.closed_form import IsoLoss
from isofast.methods.ema import EmaTarget
from isofast.methods.networks import (
    Branch,
    feature_dim,
    make_encoder,
    make_projector,
)
from isofast.training.step import Online


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("stem", "padding", "size", "expected"),
    [
        ("cifar", 1, 32, 32),
        ("cifar", 2, 32, 34),
        ("tiny", 1, 64, 32),
        ("imagenet", 1, 96, 24),
    ],
)
def test_stem_resolution(stem: str, padding: int, size: int, expected: int) -> None:
    encoder = make_encoder(EncoderConfig(stem=stem, stem_padding=padding))
    x_BCHW = torch.zeros(2, 3, size, size)
    maps = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x_BCHW))))
    assert maps.shape == (2, 64, expected, expected)


@pytest.mark.parametrize("width", [4, 16, 64])
def test_features_have_the_promised_size(width: int) -> None:
    config = EncoderConfig(stem="cifar", width=width)
    encoder = make_encoder(config)
    h_BF = encoder(torch.randn(2, 3, 16, 16))
    assert h_BF.shape == (2, feature_dim(encoder, 16)) == (2, 8 * width)
    assert encoder.training and encoder.bn1.num_batches_tracked == 1


def test_names_are_torchvisions() -> None:
    ours = set(make_encoder(EncoderConfig(width=8)).state_dict())
    assert ours == {name for name in resnet18().state_dict() if not name.startswith("fc.")}


def test_imagenet_stem_is_torchvisions_resnet() -> None:
    for name, theirs in (("resnet18", resnet18()), ("resnet50", resnet50())):
        expected = parameter_count(theirs) - parameter_count(theirs.fc)
        assert parameter_count(make_encoder(EncoderConfig(name=name))) == expected


def test_narrow_convolutions_keep_torchvisions_initialisation() -> None:
    torch.manual_seed(0)
    conv = make_encoder(EncoderConfig(width=32)).layer4[1].conv2
    expected = (2 / (conv.out_channels * 9)) ** 0.5
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)


def test_projector_has_biases_and_no_last_batchnorm() -> None:
    first, norm, act, last = make_projector(512, ProjectorConfig())
    assert (first.in_features, first.out_features, last.out_features) == (512, 4096, 256)
    assert first.bias is not None and last.bias is not None
    assert isinstance(norm, nn.BatchNorm1d) and isinstance(act, nn.ReLU)


def _branch(precision: torch.dtype = torch.float32) -> Branch:
    torch.manual_seed(0)
    return Branch(
        EncoderConfig(stem="cifar", width=4), ProjectorConfig(hidden=32, output=8), precision
    )


def _online(branch: Branch) -> Online:
    method = IsoLoss(IsoLoss.Config(), ProjectorConfig(output=8))
    return Online(branch, nn.Linear(32, 3), method)


def test_each_view_has_its_own_batch_statistics() -> None:
    branch = _branch()
    x1, x2 = torch.randn(8, 3, 16, 16), 5 + 3 * torch.randn(8, 3, 16, 16)
    output = _online(branch)(Batch(x1, x2, torch.zeros(8, dtype=torch.long)))
    alone = _branch()
    torch.testing.assert_close(output.z1_BD, alone(x1)[1].detach())
    alone(x2)
    # running statistics moved twice, in order
    torch.testing.assert_close(branch.encoder.bn1.running_mean, alone.encoder.bn1.running_mean)


def test_the_probe_sends_no_gradient_to_the_encoder() -> None:
    online = _online(_branch())
    output = online(Batch(*torch.randn(2, 4, 3, 16, 16), torch.arange(4) % 3))
    output.probe.loss.backward()
    assert online.probe.weight.grad is not None
    assert all(p.grad is None for p in online.branch.parameters())


def test_target_is_a_frozen_copy() -> None:
    online = _branch()
    target = EmaTarget(online, base=0.99)
    for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs and not mine.requires_grad


def test_the_branch_is_one_graph_for_the_compiler() -> None:
    x_BCHW = torch.randn(4, 3, 16, 16)
    expected = _branch()(x_BCHW)
    branch = _branch()
    names = set(branch.state_dict())
    branch.compile(fullgraph=True, backend="aot_eager")
    for got, wanted in zip(branch(x_BCHW), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert set(branch.state_dict()) == names


def test_bf16_autocast_keeps_parameters_and_batchnorm_in_fp32() -> None:
    branch = _branch(torch.bfloat16)
    _, z_BD = branch(torch.randn(4, 3, 16, 16))
    assert z_BD.dtype == torch.bfloat16
    assert {t.dtype for t in branch.parameters()} == {torch.float32}
    assert branch.encoder.bn1.running_mean.dtype == torch.float32
    assert branch.features(torch.randn(4, 3, 16, 16)).dtype == torch.float32


def test_an_encoder_of_timm_is_timms() -> None:
    branch = Branch(EncoderConfig(name="timm:resnet10t"), ProjectorConfig(output=8), torch.float32)
    theirs = timm.create_model("resnet10t", num_classes=0)
    theirs.load_state_dict(dict(branch.encoder.state_dict()))
    h_BF, z_BD = branch(torch.randn(2, 3, 32, 32))
    assert h_BF.shape == (2, theirs.num_features) and z_BD.shape == (2, 8)


def tiny() -> nn.Module:
    """An encoder of one's own."""
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def no_features() -> nn.Module:
    """Not an encoder: its maps aren't pooled."""
    return nn.Conv2d(3, 5, 3)


def test_an_encoder_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    here = types.ModuleType("my_encoders")
    here.tiny, here.no_features, here.number = tiny, no_features, lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_encoders", here)
    encoder = make_encoder(EncoderConfig(name="my_encoders:tiny"))
    assert feature_dim(encoder, 16) == 5
    with pytest.raises(UserError, match=r"features \(B, F\), got \(1, 5, 14, 14\)"):
        feature_dim(make_encoder(EncoderConfig(name="my_encoders:no_features")), 16)
    with pytest.raises(UserError, match="number returns int, not a module"):
        make_encoder(EncoderConfig(name="my_encoders:number"))


@pytest.mark.parametrize(
    ("name", "words"),
    [("timm:resnet10tt", "resnet10tt"), ("my_encoder:make", "No module named 'my_encoder'")],
)
def test_encoders_that_do_not_exist_are_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_encoder(EncoderConfig(name=name))


def test_an_encoder_for_another_size_names_the_key() -> None:
    vit = make_encoder(EncoderConfig(name="timm:vit_tiny_patch16_224"))
    assert feature_dim(vit, 224) == 192
    with pytest.raises(UserError, match=r"32 x 32 pixels .* set data\.crop"):
        feature_dim(vit, 32)
