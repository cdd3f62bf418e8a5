"""The networks: a torchvision ResNet with the paper's stems, the projector, the online module.

Shapes: B images of a view, C x H x W pixels, F backbone features, D embedding dimensions,
K classes of the probe.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock

from isofast.config import EncoderConfig, MethodConfig, ProjectorConfig

_STAGES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class ViewOutput(NamedTuple):
    """What the online network makes of one view."""

    z_BD: Tensor
    """Embeddings, neither normalised nor centred; differentiable."""
    logits_BK: Tensor
    """The probe's logits, from detached features."""
    p_BD: Tensor | None = None
    """A trained predictor's output for z; differentiable."""


def make_encoder(config: EncoderConfig) -> nn.Module:
    """A ResNet without its classifier, x_BCHW -> h_BF, under torchvision's parameter names.

    Weights are random, by torchvision's own initialisation, from torch's global generator.
    """
    net: resnet.ResNet = getattr(resnet, config.name)(weights=None)
    net.fc = nn.Identity()
    if config.width != 64:
        _narrow(net, config)
    if config.stem != "imagenet":
        net.conv1 = nn.Conv2d(3, config.width, 3, 1, config.stem_padding, bias=False)
        _initialise(net.conv1)
    if config.stem == "cifar":
        net.maxpool = nn.Identity()
    encoder: nn.Module = net
    return encoder


def feature_dim(config: EncoderConfig) -> int:
    """F, the size of the pooled features."""
    return config.width * (32 if config.name == "resnet50" else 8)


def make_projector(features: int, config: ProjectorConfig) -> nn.Sequential:
    """h_BF -> z_BD: Linear - BatchNorm - ReLU - Linear, with biases, no BatchNorm at the end."""
    return nn.Sequential(
        nn.Linear(features, config.hidden),
        nn.BatchNorm1d(config.hidden),
        nn.ReLU(inplace=True),
        nn.Linear(config.hidden, config.output),
    )


def make_predictor(method: MethodConfig, projector: ProjectorConfig) -> nn.Module | None:
    """z_BD -> p_BD, trained; None where the predictor is a closed form of C.

    byol and simsiam have a second projector, Linear - BatchNorm - ReLU - Linear with the hidden
    units of the first; linear has a matrix without bias.
    """
    if method.predictor == "mlp":
        return make_projector(projector.output, projector)
    if method.predictor == "linear":
        return nn.Linear(projector.output, projector.output, bias=False)
    return None


class Branch(nn.Module):
    """Encoder and projector, x_BCHW -> (h_BF, z_BD), under autocast to ``precision``."""

    def __init__(
        self, encoder: EncoderConfig, projector: ProjectorConfig, precision: torch.dtype
    ) -> None:
        super().__init__()
        self.precision = precision
        self.encoder = make_encoder(encoder)
        self.projector = make_projector(feature_dim(encoder), projector)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(x_BCHW, self.precision):
            h_BF = self.encoder(x_BCHW)
            return h_BF, self.projector(h_BF)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """h_BF in fp32, in the mode (train or eval) that the module is in."""
        with autocast(x_BCHW, self.precision):
            h_BF: Tensor = self.encoder(x_BCHW)
        return h_BF.float()


class Online(nn.Module):
    """Everything that has a gradient: the branch, the probe on its detached features, and the
    predictor where that is trained.

    Both views go through one forward call, one after the other, so that each has BatchNorm
    statistics of its own and the running statistics move twice, in order.
    """

    def __init__(
        self, branch: Branch, probe: nn.Linear, predictor: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.branch = branch
        self.probe = probe
        self.predictor = predictor

    def forward(self, x1_BCHW: Tensor, x2_BCHW: Tensor) -> tuple[ViewOutput, ViewOutput]:
        return self._view(x1_BCHW), self._view(x2_BCHW)

    def _view(self, x_BCHW: Tensor) -> ViewOutput:
        h_BF, z_BD = self.branch(x_BCHW)
        logits_BK = self.probe(h_BF.detach().float())
        if self.predictor is None:
            return ViewOutput(z_BD, logits_BK)
        with autocast(z_BD, self.branch.precision):
            return ViewOutput(z_BD, logits_BK, self.predictor(z_BD))


def autocast(x: Tensor, precision: torch.dtype) -> torch.autocast:
    """Autocast to ``precision`` on the device of ``x``; none for fp32."""
    return torch.autocast(x.device.type, precision, enabled=precision != torch.float32)


def make_target(online: Branch) -> Branch:
    """A copy that takes no gradient, to be moved by an average of the online parameters."""
    return copy.deepcopy(online).requires_grad_(False)


def _narrow(net: resnet.ResNet, config: EncoderConfig) -> None:
    """Rebuilds the stages with ``config.width`` channels in the first."""
    width = config.width
    net.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    net.bn1 = nn.BatchNorm2d(width)
    net.inplanes = width
    for stage, blocks in enumerate(_STAGES[config.name]):
        layer = net._make_layer(BasicBlock, width * 2**stage, blocks, stride=1 if stage == 0 else 2)
        setattr(net, f"layer{stage + 1}", layer)
    for module in net.modules():
        _initialise(module)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
