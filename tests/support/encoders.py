"""Untrained networks, and runs of them in the format that training writes."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from isofast.config.load import validate
from isofast.config.schema import Config, to_json
from isofast.data import recipe_for
from isofast.methods import make_method
from isofast.methods.networks import Branch, make_encoder
from isofast.methods.weights import describe
from isofast.run.checkpoint import save_checkpoint
from isofast.training.step import Online


def make_online(config: Config, precision: torch.dtype = torch.float32) -> Online:
    """Return the same network at each call, with a ten-class probe."""
    torch.manual_seed(0)
    branch = Branch(config.encoder, config.projector, precision)
    probe = nn.Linear(branch.features_out, 10)
    return Online(branch, probe, make_method(config.method, config.projector))


def write_run(
    folder: Path, settings: dict[str, Any], *, step: int = 3, described: bool = True
) -> nn.Module:
    """Write a run of a random encoder whose BatchNorm has seen images; return the encoder."""
    config = validate(settings)
    recipe = recipe_for(config.data.dataset, crop=config.data.crop)
    torch.manual_seed(step)
    encoder = make_encoder(config.encoder)
    with torch.no_grad():
        for _ in range(3):
            encoder(1 + 2 * torch.randn(8, 3, recipe.crop, recipe.crop))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(to_json(config))
    about = describe(config.encoder, recipe) if described else {"format": "pt"}
    save_checkpoint(folder / "checkpoints", step, {}, encoder.state_dict(), 5, about)
    return encoder.eval()
