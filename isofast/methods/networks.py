"""The networks: encoder (torchvision ResNets with the paper's stems, or any other) and projector.

Shapes: B images per view, C x H x W pixels, F backbone features, D embedding dimensions.
"""

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_unshuffle
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck

from isofast.config.plugins import import_object
from isofast.config.schema import EncoderConfig, ProjectorConfig
from isofast.data import Batch
from isofast.errors import UserError
from isofast.methods.batch_norm import convert_batch_norm, foreign_batch_norms

STAGES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


def make_encoder(config: EncoderConfig) -> nn.Module:
    """Return the backbone x_BCHW -> h_BF, with its library's initialisation and parameter names.

    Raises:
        UserError: timm is not installed or lacks the model, or your function fails.
    """
    if ":" in config.name:
        return _make_other(config.name)
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


@torch.no_grad()
def feature_dim(encoder: nn.Module, side: int) -> int:
    """Return F, the encoder's number of features for ``side`` x ``side`` images.

    Raises:
        UserError: the encoder rejects such images or does not return (B, F).
    """
    training = encoder.training
    try:
        h_BF = encoder.eval()(torch.zeros(1, 3, side, side))
    except Exception as error:
        raise UserError(
            f"the encoder rejects images of {side} x {side} pixels ({error}); set data.crop to the "
            f"size it needs"
        ) from error
    finally:
        encoder.train(training)
    shape = tuple(getattr(h_BF, "shape", ()))
    if len(shape) != 2:
        got = shape or type(h_BF).__name__
        raise UserError(f"encoder.name: the encoder must return features (B, F), got {got}")
    features: int = shape[1]
    return features


def make_projector(features: int, config: ProjectorConfig) -> nn.Sequential:
    """Return h_BF -> z_BD: Linear - BatchNorm - ReLU - Linear, with biases."""
    return nn.Sequential(
        nn.Linear(features, config.hidden),
        nn.BatchNorm1d(config.hidden),
        nn.ReLU(inplace=True),
        nn.Linear(config.hidden, config.output),
    )


class Branch(nn.Module):
    """Encoder and projector, x_BCHW -> (h_BF, z_BD), under autocast to ``precision``.

    Args:
        encoder, projector: the config's sections.
        precision: autocast dtype of the networks.
        side: image size in pixels, from which the encoder's F is found.
        stacked: pass both views in one call, which halves the kernel launches on a GPU and the
            all-reduces of synchronised BatchNorm; ignored if the encoder has a BatchNorm class that
            is not torch's. Without either, separate calls are 5 to 10 % faster on a CPU.
        synchronised: compute BatchNorm statistics over all ranks.
        fused: as in ViewBatchNorm, for a compiled branch on a GPU; torchvision's ResNets then apply
            their ReLUs inside BatchNorm.
        pieces: number of micro-batches, each with its own BatchNorm statistics. Only one
            micro-batch's activations are kept; they are recomputed for the backward pass.

    Raises:
        UserError: the encoder cannot be created, or its BatchNorm cannot be synchronised.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        projector: ProjectorConfig,
        precision: torch.dtype,
        side: int = 32,
        *,
        stacked: bool = False,
        synchronised: bool = False,
        fused: bool = False,
        pieces: int = 1,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.pieces = pieces
        self.encoder = make_encoder(encoder)
        self.features_out = feature_dim(self.encoder, side)
        self.projector = make_projector(self.features_out, projector)
        foreign = foreign_batch_norms(self)
        if foreign and synchronised:
            raise UserError(
                f"{encoder.name} has {', '.join(sorted(foreign))}, whose statistics cannot be "
                f"synchronised across processes; --set train.batch_norm=local"
            )
        self.stacked = stacked and not foreign
        views = 2 if self.stacked else 1
        convert_batch_norm(self, views=views, synchronised=synchronised, fused=fused)
        if fused and ":" not in encoder.name:
            _join_relus(self.encoder)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(x_BCHW, self.precision):
            h_BF = self.encoder(x_BCHW)
            return h_BF, self.projector(h_BF)

    def of_views(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Return (h_BF, z_BD) of each view; B must be a multiple of ``pieces``."""
        if self.pieces == 1:
            return self._of_piece(batch.x_NCHW)
        views = (x_BCHW.chunk(self.pieces) for x_BCHW in batch.x_NCHW.chunk(2))

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            # recomputation must not update running statistics again
            return nullcontext(), _momentum_zero(self)

        found = [
            checkpoint(self._of_piece, torch.cat(both), use_reentrant=False, context_fn=contexts)
            for both in zip(*views, strict=True)
        ]
        joined = [
            map(torch.cat, zip(*of_view, strict=True)) for of_view in zip(*found, strict=True)
        ]
        return [(h_BF, z_BD) for h_BF, z_BD in joined]

    def _of_piece(self, x_NCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (h_BF, z_BD) of each view, from one call of the network if ``stacked``."""
        if not self.stacked:
            return [self(x_BCHW) for x_BCHW in x_NCHW.chunk(2)]
        h_NF, z_ND = self(x_NCHW)
        return list(zip(h_NF.chunk(2), z_ND.chunk(2), strict=True))

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return h_BF in fp32, in the module's current mode (train or eval)."""
        with autocast(x_BCHW, self.precision):
            h_BF: Tensor = self.encoder(x_BCHW)
        return h_BF.float()


def autocast(x: Tensor, precision: torch.dtype) -> AbstractContextManager[object]:
    """Return autocast to ``precision`` on the device of ``x``, or a null context for fp32."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(x.device.type, precision)


@contextmanager
def _momentum_zero(module: nn.Module) -> Iterator[None]:
    norms = [norm for norm in module.modules() if isinstance(norm, _NormBase)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        # a GPU's backward recomputes in a thread that lacks build()'s limit (torch 2.14)
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        for norm, settings in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = settings


def _make_other(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    try:
        if library == "timm":
            encoder = importlib.import_module("timm").create_model(model, num_classes=0)
        else:
            encoder = import_object(name)()
    except Exception as error:
        hint = " Install it with `pip install timm`" if "'timm'" in str(error) else ""
        raise UserError(
            f"encoder.name: cannot create {name!r}: {type(error).__name__}: {error}.{hint}"
        ) from error
    if not isinstance(encoder, nn.Module):
        raise UserError(f"encoder.name: {name} returns {type(encoder).__name__}, not a module")
    if any(is_lazy(tensor) for tensor in (*encoder.parameters(), *encoder.buffers())):
        raise UserError(f"encoder.name: {name} has lazy layers; give their sizes")
    return encoder


def _narrow(net: resnet.ResNet, config: EncoderConfig) -> None:
    """Rebuild the stem and stages with ``config.width`` channels in the first stage."""
    width = config.width
    net.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    net.bn1 = nn.BatchNorm2d(width)
    net.inplanes = width
    for stage, blocks in enumerate(STAGES[config.name]):
        layer = net._make_layer(BasicBlock, width * 2**stage, blocks, stride=1 if stage == 0 else 2)
        setattr(net, f"layer{stage + 1}", layer)
        if stage and net.inplanes < 32:
            layer[0].downsample[0].__class__ = _NarrowShortcut
    for module in net.modules():
        _initialise(module)


class _NarrowShortcut(nn.Conv2d):
    """A 1 x 1 convolution with stride 2.

    On a CPU torch's own, of channels_last maps with fewer than 16 channels and 48 pixels or more,
    writes outside its memory (2.14.1).
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return conv2d(x_BCHW[..., ::2, ::2], self.weight)


class _ReLU(torch.autograd.Function):
    """A ReLU whose masked gradient is written to memory once, for both branches of a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        dx = torch.where(y > 0, dy, 0.0)
        # Inductor would recompute dx for each reader; as_strided forces it into memory
        return dx.as_strided(dx.shape, dx.stride())


class _JoinedBlock(BasicBlock):  # type: ignore[misc]
    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.bn1(self.conv1(x_BCHW), relu=True)
        h_BCHW = self.bn2(self.conv2(h_BCHW))
        identity_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        out_BCHW: Tensor = _ReLU.apply(h_BCHW + identity_BCHW)
        return out_BCHW


class _JoinedBottleneck(Bottleneck):  # type: ignore[misc]
    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.bn1(self.conv1(x_BCHW), relu=True)
        h_BCHW = self.bn2(self.conv2(h_BCHW), relu=True)
        h_BCHW = self.bn3(self.conv3(h_BCHW))
        identity_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        out_BCHW: Tensor = _ReLU.apply(h_BCHW + identity_BCHW)
        return out_BCHW


class _JoinedResNet(resnet.ResNet):  # type: ignore[misc]
    def _forward_impl(self, x_BCHW: Tensor) -> Tensor:
        # an Identity if the stem does not pool
        pool = isinstance(self.maxpool, nn.MaxPool2d)
        h_BCHW = self.bn1(_aligned_convolution(self.conv1, x_BCHW), relu=True, pool=pool)
        h_BCHW = self.layer4(self.layer3(self.layer2(self.layer1(h_BCHW))))
        h_BF: Tensor = self.fc(self.avgpool(h_BCHW).flatten(1))
        return h_BF


def _aligned_convolution(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """Apply a stem's convolution with channels zero-padded to a multiple of 8, for tensor cores.

    A 7 x 7 kernel with stride 2 first becomes a 4 x 4 kernel with stride 1: each 2 x 2 block of
    pixels becomes one pixel with four times the channels.
    """
    weight = conv.weight
    padding: Any = conv.padding
    sides = (0, 0, 0, 0)
    if conv.kernel_size == (7, 7) and conv.stride == (2, 2) and padding == (3, 3):
        x_BCHW = pad(x_BCHW, (0, x_BCHW.shape[3] % 2, 0, x_BCHW.shape[2] % 2))
        x_BCHW, weight = pixel_unshuffle(x_BCHW, 2), pixel_unshuffle(pad(weight, (1, 0, 1, 0)), 2)
        sides, padding = (2, 1, 2, 1), 0
    elif conv.stride != (1, 1):
        return cast(Tensor, conv(x_BCHW))
    more = -x_BCHW.shape[1] % 8
    x_BCHW, weight = pad(x_BCHW, (*sides, 0, more)), pad(weight, (0, 0, 0, 0, 0, more))
    return conv2d(x_BCHW, weight, padding=padding)


_JOINED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: _JoinedBlock,
    Bottleneck: _JoinedBottleneck,
    resnet.ResNet: _JoinedResNet,
}


def _join_relus(encoder: nn.Module) -> None:
    """Make torchvision's modules call BatchNorm and ReLU as one op, and change nothing else."""
    for module in encoder.modules():
        if type(module) in _JOINED:
            module.__class__ = _JOINED[type(module)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
