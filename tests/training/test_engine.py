"""The launchers' environments, the cores of a rank, BatchNorm across ranks."""

import os

import pytest
import torch

from isofast.config.load import validate
from isofast.distributed import World, cores_of_rank, launched_rank, launched_world_size
from isofast.training.build import synchronises_batch_norm


@pytest.mark.parametrize(
    ("launched", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (3, 4)),
        # a batch script without srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),
    ],
)
def test_the_rank_is_known_before_the_group_exists(
    launched: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert (launched_rank(), launched_world_size()) == expected


@pytest.mark.parametrize(
    ("launched", "sharing"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"LOCAL_SIZE": "1"}, 1),
        ({"LOCAL_WORLD_SIZE": "64"}, 64),
        # Slurm has bound the process to its cores
        ({"SLURM_STEP_NUM_TASKS": "8", "LOCAL_WORLD_SIZE": "8"}, 1),
        # a shell or a launcher of several ranks, with the cores of them all
        ({"SLURM_STEP_NUM_TASKS": "1", "LOCAL_SIZE": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "2", "LOCAL_WORLD_SIZE": "4"}, 4),
    ],
)
def test_cores_are_shared_with_the_neighbours(
    launched: dict[str, str], sharing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    world = World(rank=0, size=8, local_rank=0, device=torch.device("cpu"))
    assert cores_of_rank(world) == max(1, len(os.sched_getaffinity(0)) // sharing)


@pytest.mark.parametrize(
    ("asked", "size", "expected"),
    [("auto", 1, False), ("auto", 2, True), ("synchronised", 1, False), ("local", 2, False)],
)
def test_batchnorm_across_ranks(asked: str, size: int, expected: bool) -> None:
    config = validate({"data": {"root": "x"}, "train": {"batch_norm": asked}})
    world = World(0, size, 0, torch.device("cpu"))
    assert synchronises_batch_norm(config, world) == expected
