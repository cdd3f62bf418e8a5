"""Stems, widths and names of the networks."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from isofast.config.schema import EncoderConfig, ProjectorConfig
from isofast.errors import UserError
from isofast.methods.networks import Branch, _aligned_convolution, feature_dim, make_encoder

from ..support.runs import call


@pytest.mark.parametrize(
    ("stem", "padding", "size", "expected"),
    [("cifar", 1, 32, 32), ("cifar", 2, 32, 34), ("tiny", 1, 64, 32), ("imagenet", 1, 96, 24)],
)
def test_stem_resolution(stem, padding, size, expected):
    encoder = make_encoder(EncoderConfig(stem=stem, stem_padding=padding))
    x_BCHW = torch.zeros(2, 3, size, size)
    maps = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x_BCHW))))
    assert maps.shape == (2, 64, expected, expected)


@pytest.mark.parametrize("width", [4, 16, 64])
def test_features_have_the_promised_size(width):
    encoder = make_encoder(EncoderConfig(stem="cifar", width=width))
    h_BF = encoder(torch.randn(2, 3, 16, 16))
    assert h_BF.shape == (2, feature_dim(encoder, 16)) == (2, 8 * width)
    assert encoder.training and encoder.bn1.num_batches_tracked == 1


NARROW = """
import torch
from isofast.config.schema import EncoderConfig
from isofast.methods.networks import make_encoder

encoder = make_encoder(EncoderConfig(stem="cifar", width=4)).to(memory_format=torch.channels_last)
x_BCHW = torch.randn(4, 3, 96, 96).to(memory_format=torch.channels_last).requires_grad_()
for precise in (True, False) * 3:
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        encoder(x_BCHW).float().square().sum().backward()
"""


@pytest.mark.slow
def test_narrow_networks_of_large_images_stay_within_their_memory():
    call([sys.executable, "-c", NARROW], MALLOC_CHECK_="3")


def test_narrow_shortcuts_are_torchs():
    encoder = make_encoder(EncoderConfig(stem="cifar", width=4)).double()
    for layer, channels in ((encoder.layer2, 4), (encoder.layer3, 8), (encoder.layer4, 16)):
        shortcut = layer[0].downsample[0]
        x_BCHW = torch.randn(2, channels, 7, 6, dtype=torch.float64)
        expected = nn.Conv2d.forward(shortcut, x_BCHW)
        torch.testing.assert_close(shortcut(x_BCHW), expected)
        assert (type(shortcut) is nn.Conv2d) == (channels == 16)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_narrow_networks_have_torchvisions_layers(name):
    narrow, plain = (make_encoder(EncoderConfig(name=name, width=width)) for width in (8, 64))
    assert [*narrow.state_dict()] == [*plain.state_dict()]


def test_narrow_convolutions_keep_torchvisions_initialisation():
    torch.manual_seed(0)
    encoder = make_encoder(EncoderConfig(width=32, stem="cifar"))
    for conv, rel in ((encoder.conv1, 0.1), (encoder.layer4[1].conv2, 0.02)):
        expected = (2 / (conv.out_channels * 9)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=rel)


def test_bf16_autocast_keeps_parameters_and_batchnorm_in_fp32():
    config = EncoderConfig(stem="cifar", width=4), ProjectorConfig(hidden=32, output=8)
    branch = Branch(*config, torch.bfloat16)
    _, z_BD = branch(torch.randn(4, 3, 16, 16))
    assert z_BD.dtype == torch.bfloat16
    assert {t.dtype for t in branch.parameters()} == {torch.float32}
    assert branch.encoder.bn1.running_mean.dtype == torch.float32
    x_BCHW = torch.randn(4, 3, 16, 16)
    h_BF = branch.eval()(x_BCHW)[0]
    assert h_BF.dtype == torch.bfloat16 and torch.equal(branch.features(x_BCHW), h_BF.float())


def test_an_encoder_of_your_own(monkeypatch):
    pooled = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    mine = SimpleNamespace(tiny=lambda: pooled, maps=lambda: nn.Conv2d(3, 5, 3), number=lambda: 3)
    mine.lazy = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    monkeypatch.setitem(sys.modules, "my_encoders", mine)
    encoder = make_encoder(EncoderConfig(name="my_encoders:tiny"))
    assert feature_dim(encoder, 16) == 5
    with pytest.raises(UserError, match=r"features \(B, F\), got \(1, 5, 14, 14\)"):
        feature_dim(make_encoder(EncoderConfig(name="my_encoders:maps")), 16)
    with pytest.raises(UserError, match="number returns int, not a module"):
        make_encoder(EncoderConfig(name="my_encoders:number"))
    with pytest.raises(UserError, match="lazy has lazy layers"):
        make_encoder(EncoderConfig(name="my_encoders:lazy"))


@pytest.mark.parametrize(
    ("name", "words"),
    [("timm:resnet10tt", "resnet10tt"), ("no_module:make", "No module named 'no_module'")],
)
def test_encoders_that_do_not_exist_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        make_encoder(EncoderConfig(name=name))


def test_an_encoder_for_another_size_names_the_key():
    vit = make_encoder(EncoderConfig(name="timm:vit_tiny_patch16_224"))
    assert feature_dim(vit, 224) == 192
    with pytest.raises(UserError, match=r"32 x 32 pixels .* set data\.crop"):
        feature_dim(vit, 32)


@pytest.mark.parametrize("side", [16, 17])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 1, 0), (7, 2, 3)])
def test_a_stems_convolution_of_aligned_channels_is_torchs(kernel, stride, padding, side):
    conv = nn.Conv2d(3, 8, kernel, stride, padding, bias=False).double()
    x_BCHW = torch.randn(2, 3, side, side + 1, dtype=torch.float64)
    both = [conv(x_BCHW), _aligned_convolution(conv, x_BCHW)]
    gradients = [torch.autograd.grad(y.square().sum(), conv.weight) for y in both]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
