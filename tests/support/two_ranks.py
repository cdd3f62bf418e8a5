"""One rank of a group: real steps of method and engine on its share of fixed batches.

Expects RANK, WORLD_SIZE and the rest in the environment; rank 0 writes its results.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from isofast.config.load import load_config, validate
from isofast.config.schema import Config
from isofast.data import Batch
from isofast.data.folder import UNLABELLED
from isofast.data.images import agree_on_images, list_images
from isofast.distributed import (
    World,
    gather_objects,
    gather_rows,
    mean_of_statistics_over_ranks_,
    mean_over_ranks_,
)
from isofast.errors import UserError
from isofast.training.build import build
from isofast.training.parallel import check_same_config, close_world, init_world

GLOBAL_BATCH = 16


def main(config_path: str, output: str) -> None:
    """Take two steps, then exchange what ranks exchange besides gradients."""
    world = init_world()
    config = load_config(Path(config_path))
    state = build(config, world, classes=10, uneven_labels=True)
    state.online.train()
    generator = torch.Generator().manual_seed(5)
    share = slice(
        world.rank * GLOBAL_BATCH // world.size, (world.rank + 1) * GLOBAL_BATCH // world.size
    )
    results: dict[str, Any] = {}
    for step in range(2):
        x1, x2 = torch.randn(2, GLOBAL_BATCH, 3, 16, 16, generator=generator)
        y = torch.randint(10, (GLOBAL_BATCH,), generator=generator)
        # one of two ranks has no label
        y[:9] = UNLABELLED
        batch = Batch(torch.cat([x1[share], x2[share]]), y[share])
        output_of_step = state.engine(batch, state.target and state.target(batch))
        loss = output_of_step.loss + output_of_step.probe.loss
        state.engine.backward(loss)
        results[f"loss{step}"] = mean_over_ranks_(loss.detach().clone())
        for name, parameter in state.online.named_parameters():
            results[f"grad{step}.{name}"] = parameter.grad.clone()
        state.engine.step()
        results[f"corr{step}"] = state.method.correlation.corr_DD.clone()

    buffers = [b for b in state.online.branch.buffers() if b.is_floating_point()]
    for buffer in buffers:
        buffer.fill_(world.rank)
    mean_of_statistics_over_ranks_(state.online)
    results["buffers"] = torch.cat([buffer.flatten() for buffer in buffers])
    results["rows"] = gather_rows(torch.full((world.rank + 1, 2), float(world.rank)))
    results["objects"] = gather_objects(world.rank)
    results["refused"] = gather_objects(refusals(config, world))
    results["configs"] = gather_objects(other_configs(config, world))
    if world.size == 1:
        captured = state.capture()
        state.restore(captured, 3)
        results["steps restored"] = state.engine.global_steps
        results["clipping"] = state.engine.gradient_clipping()
        (results["another device"],) = state.restore(captured | {"device": "cuda"}, 3)
    if world.is_main:
        torch.save(results, output)
    close_world()


def refusals(config: Config, world: World) -> list[str]:
    """Return this rank's errors when all have the same images, and when one has others."""
    images, last = list_images(config), world.size - 1
    others, other_val = (
        images._replace(**{split: replace(getattr(images, split), fingerprint="others")})
        for split in ("train", "val")
    )
    paths = ("train/0/gone.png", *images.train.paths[1:])
    unreadable = images._replace(train=replace(images.train, paths=paths))
    told = []
    cases = ((images, 0), (others, last), (unreadable, last), (unreadable, 0), (other_val, last))
    for these, rank in cases:
        mine = these if world.rank == rank else images
        try:
            agreed = agree_on_images(config, world, mine)
            assert agreed.train.fingerprint == mine.train.fingerprint
            told.append("")
        except UserError as error:
            told.append(str(error))
    return told


def other_configs(config: Config, world: World) -> list[str]:
    """Return this rank's errors when the last rank's config differs in one key."""
    told = []
    for key in (
        *("data.threads=3", "logging.loggers=[]"),
        *("optimizer.lr=7.0", "logging.every_steps=99", "data.crop=32"),
    ):
        config_here = validate(config.model_dump(mode="json"), [key] * (world.rank > 0))
        try:
            check_same_config(config_here)
            told.append("")
        except UserError as error:
            told.append(str(error))
    return told
