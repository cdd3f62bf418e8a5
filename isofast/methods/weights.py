"""Encoder weight files, ours and other libraries', and the metadata in ours."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from isofast.config.schema import RESNETS, EncoderConfig
from isofast.data import Recipe, recipe_for
from isofast.data.folder import some_of
from isofast.errors import UserError
from isofast.methods.networks import make_encoder

Tensors = dict[str, Tensor]

_CLASSIFIERS = ("fc.", "classifier.", "head.", "head_dist.")
# where nn.Sequential(*resnet.children()) has a ResNet's parts, as lightly's examples build it
_NUMBERS = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
# our BatchNorm has no counter, and evaluation never reads it
_COUNTER = "num_batches_tracked"
_FIRST = "conv1.weight"


class Weights(NamedTuple):
    """A file's tensors and its metadata about their encoder."""

    path: Path
    tensors: Tensors
    about: Mapping[str, str]


def describe(config: EncoderConfig, recipe: Recipe) -> dict[str, str]:
    """Return safetensors metadata: the encoder's settings and the images that it expects.

    Strings are stored as they are, numbers and lists as JSON.
    """
    about: dict[str, Any] = config.model_dump(exclude={"init"})
    about |= {key: getattr(recipe, key) for key in ("crop", "resize_short", "mean", "std")}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    return {"format": "pt", **texts}


def read_weights(path: Path) -> Weights:
    """Read a .safetensors file, or a state dict written by torch.save.

    A training checkpoint may hold it under "state_dict" or "model".

    Raises:
        UserError: the file cannot be read or holds no state dict.
    """
    about: Mapping[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = file.metadata() or {}
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    # unpickling may raise anything
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, UnpicklingError):
            # torch advises to load it unsafely
            reason = "it holds more than tensors, or is not a torch file"
        raise UserError(
            f"cannot read the weights {path}: {reason}. Give a run's folder, a .safetensors file, "
            f"or a state dict saved by torch.save"
        ) from error
    # torchvision's names are recognised without timm
    if isinstance(found, Mapping) and found.get("arch", RESNETS[0]) not in RESNETS:
        about = {"architecture": str(found["arch"])}
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {
        str(name): tensor
        for name, tensor in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(tensor, Tensor)
    }
    if not tensors:
        raise UserError(f"{path} holds {type(found).__name__}, not a state dict of tensors")
    return Weights(path, tensors, about)


def encoder_of(weights: Weights) -> tuple[EncoderConfig, Recipe]:
    """Return the encoder that a file's weights belong to and the images that it expects.

    Our files record both. torchvision's ResNets are recognised by names and shapes, timm's models
    by the checkpoint's "arch" or a config.json beside it, as on the Hugging Face Hub. Images are
    then those of ImageNet or of that config.json.

    Raises:
        UserError: the encoder cannot be determined.
    """
    try:
        stated = _stated(weights)
    # pydantic's and JSON's errors are ValueErrors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).partition(" [type=")[0].split())
        raise UserError(f"the encoder metadata of {weights.path} is damaged: {reason}") from None
    return stated or (_resnet_of(weights), recipe_for("imagefolder"))


def load_weights(encoder: nn.Module, weights: Weights, *, other_stem: bool = False) -> list[str]:
    """Load a file's weights into ``encoder``, leaving out a classifier's.

    Args:
        encoder: updated in place; no parameter or buffer is replaced.
        weights: from `read_weights`.
        other_stem: leave the first convolution alone if its kernel size differs.

    Returns:
        Descriptions of the tensors that were left alone.

    Raises:
        UserError: names or shapes do not match; ``encoder`` is then unchanged.
    """
    own = encoder.state_dict()
    given = {
        name: tensor
        for name, tensor in _bare(weights.tensors, own).items()
        if name in own or not (name.startswith(_CLASSIFIERS) or name.endswith(_COUNTER))
    }
    kept = []
    if other_stem and _FIRST in own and _FIRST in given:
        here, there = own[_FIRST].shape, given[_FIRST].shape
        if here != there and here[:2] == there[:2]:
            kept.append(f"{_FIRST} ({_size(here)} here, {_size(there)} there)")
            del given[_FIRST], own[_FIRST]
    missing = [name for name in own if name not in given and not name.endswith(_COUNTER)]
    unknown = [name for name in given if name not in own]
    misfits = [
        f"{name} ({_size(own[name].shape)} here, {_size(given[name].shape)} there)"
        for name in given
        if name in own and own[name].shape != given[name].shape
    ]
    faults = {"missing there": missing, "unknown here": unknown, "of another shape": misfits}
    if any(faults.values()):
        listed = "; ".join(f"{what}: {some_of(names)}" for what, names in faults.items() if names)
        raise UserError(f"the weights in {weights.path} do not fit the encoder. {listed}")
    encoder.load_state_dict(given, strict=False)
    return kept


def initialise(encoder: nn.Module, path: Path) -> str:
    """Load encoder.init before the first step; return a line that describes it.

    Raises:
        UserError: the file cannot be read or does not fit.
    """
    try:
        kept = load_weights(encoder, read_weights(path), other_stem=True)
    except UserError as error:
        raise UserError(f"encoder.init: {error}") from error
    aside = f", but the first convolution is random: {kept[0]}" if kept else ""
    return f"the encoder starts with the weights of {path}{aside}"


def _stated(weights: Weights) -> tuple[EncoderConfig, Recipe] | None:
    about, recipe = weights.about, recipe_for("imagefolder")
    sizes = ("crop", "resize_short", "mean", "std")
    if about.keys() >= {"name", "stem", "stem_padding", "width", *sizes}:
        own: dict[str, Any] = {key: about[key] for key in ("name", "stem")}
        own |= {key: json.loads(about[key]) for key in ("stem_padding", "width")}
        values = {key: json.loads(about[key]) for key in sizes}
        values |= {key: tuple(values[key]) for key in ("mean", "std")}
        return EncoderConfig.model_validate(own), replace(recipe, **values)
    beside = weights.path.with_name("config.json")
    card: Mapping[str, Any] = about
    if beside.is_file():
        card = json.loads(beside.read_text(encoding="utf-8"))
    if "architecture" not in card:
        return None
    config = EncoderConfig(name=f"timm:{card['architecture']}")
    return config, _recipe_of_timm(recipe, card.get("pretrained_cfg", {}))


def _resnet_of(weights: Weights) -> EncoderConfig:
    """Return the torchvision ResNet with these names."""
    for resnet in RESNETS:
        with torch.device("meta"):
            own = make_encoder(EncoderConfig(name=resnet)).state_dict()
        tensors = _bare(weights.tensors, own)
        names = {
            name
            for name in tensors
            if not (name.startswith(_CLASSIFIERS) or name.endswith(_COUNTER))
        }
        if names == {name for name in own if not name.endswith(_COUNTER)}:
            width, _, side, _ = tensors[_FIRST].shape
            if side == 7:
                # bottlenecks come only in torchvision's width; load_weights names what differs
                return EncoderConfig(name=resnet, width=64 if resnet == "resnet50" else width)
            raise UserError(
                f"{weights.path} is a {resnet} with a first convolution of {side} x {side}, and "
                f"does not say what follows it. Give the run, its encoder.safetensors, or the "
                f"output of `isofast export --format safetensors`"
            )
    raise UserError(
        f"{weights.path} does not say which encoder its weights are for (names: "
        f"{some_of([*weights.tensors])}). Give a run, its "
        f"encoder.safetensors, weights of {', '.join(RESNETS)}, or a timm model's file with its "
        f"config.json beside it"
    )


def _bare(tensors: Tensors, own: Iterable[str]) -> Tensors:
    """Return tensors that have all of an encoder's names after a common prefix, not a target's.

    Trainers save an encoder as part of a model: "module.encoder_q.conv1.weight" in MoCo,
    "backbone.conv1.weight" in solo-learn, "backbone.0.weight" in lightly, beside an EMA target.
    """
    own = [name for name in own if not name.endswith(_COUNTER)]
    # safetensors sorts by name: MoCo's target would come first
    names = sorted(tensors, key=lambda name: "encoder_k." in name or "momentum" in name)
    for wanted in ({name: name for name in own}, {_numbered(name): name for name in own}):
        first = next(iter(wanted))
        for name in names:
            prefix = name.removesuffix(first)
            if prefix != name and all(prefix + one in tensors for one in wanted):
                cut = len(prefix)
                found = {n[cut:]: x for n, x in tensors.items() if n.startswith(prefix)}
                return {wanted.get(n, n): x for n, x in found.items()}
    return tensors


def _numbered(name: str) -> str:
    part, dot, rest = name.partition(".")
    return f"{_NUMBERS.get(part, part)}{dot}{rest}"


def _recipe_of_timm(recipe: Recipe, card: Mapping[str, Any]) -> Recipe:
    crop = card.get("input_size", (3, recipe.crop, recipe.crop))[-1]
    return replace(
        recipe,
        crop=crop,
        resize_short=round(crop / card.get("crop_pct", recipe.crop / recipe.resize_short)),
        mean=tuple(card.get("mean", recipe.mean)),
        std=tuple(card.get("std", recipe.std)),
    )


def _size(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
