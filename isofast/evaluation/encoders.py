"""Load the encoder of a run or a file as a module."""

import io
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from isofast.config.schema import Config, EncoderConfig
from isofast.data import Recipe, recipe_for
from isofast.errors import UserError
from isofast.methods.networks import make_encoder
from isofast.methods.weights import encoder_of, load_weights, read_weights
from isofast.run.checkpoint import Checkpoint, newest_checkpoint
from isofast.run.stored import read_config


class Encoder(NamedTuple):
    """An encoder in eval mode, x_BCHW -> h_BF, fp32, on the CPU."""

    module: nn.Module
    config: EncoderConfig
    recipe: Recipe
    """The recipe with the size and normalisation of its images."""


def newest_of(run_dir: Path) -> Checkpoint:
    """Return the newest intact checkpoint of a run; raise UserError if there is none."""
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        every_steps = read_config(run_dir).checkpoint.every_steps
        raise UserError(
            f"the run {run_dir} has no checkpoint yet, and so no encoder; it saves one every "
            f"{every_steps} steps and at its end"
        )
    return checkpoint


def load_encoder(source: str | PathLike[str]) -> nn.Module:
    """Return a trained encoder, x_BCHW -> h_BF, in eval mode, fp32, on the CPU.

    Args:
        source: a run's folder, for its newest intact checkpoint; a run's encoder.safetensors or a
            .safetensors from `isofast export`; weights of torchvision's resnet18, 34 or 50 (.pth,
            .safetensors), also within a model of MoCo, solo-learn or lightly; a timm model's file
            with its config.json beside it, or their folder.

    Raises:
        UserError: there is no encoder, or the file does not say which one it holds.
    """
    return read_encoder(Path(source)).module


def read_encoder(source: Path) -> Encoder:
    """Return the encoder of a run or a file with its settings; see `load_encoder`."""
    file, is_run = source, False
    if source.is_dir():
        file = source / "model.safetensors"
        is_run = not file.is_file()
    weights = read_weights(newest_of(source).path / "encoder.safetensors" if is_run else file)
    if is_run and "name" not in weights.about:
        # of a version whose files did not describe their encoder
        run = read_config(source)
        config, recipe = run.encoder, recipe_for(run.data.dataset, crop=run.data.crop)
    else:
        config, recipe = encoder_of(weights)
    # drawing weights that are then replaced must not advance the caller's generator
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        module = make_encoder(config).float()
    load_weights(module, weights)
    return Encoder(module.eval(), config, recipe)


def untrained(config: Config) -> nn.Module:
    """Return a run's encoder at step 0, whose weights are the first thing a run draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make_encoder(config.encoder)


def torch_bytes(content: object) -> bytes:
    """Return what torch.save writes; its own writer's error does not say that a disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
