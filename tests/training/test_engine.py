"""Launchers' environments, BatchNorm across ranks, what DeepSpeed is told."""

import os

import pytest
import torch

from isofast.config.load import validate
from isofast.distributed import World, launched_rank, launched_world_size
from isofast.errors import UserError
from isofast.training.build import synchronises_batch_norm
from isofast.training.parallel import _fill_launcher_environment

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def test_one_process_without_a_launcher() -> None:
    _fill_launcher_environment()
    assert [os.environ[name] for name in VARIABLES[:4]] == ["0", "1", "0", "127.0.0.1"]
    # the system chooses one that is free
    assert os.environ["MASTER_PORT"] == "0"


def test_a_launchers_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("2", "4", "0", "node", "7"), strict=True):
        monkeypatch.setenv(name, value)
    _fill_launcher_environment()
    assert [os.environ[name] for name in VARIABLES] == ["2", "4", "0", "node", "7"]


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        _fill_launcher_environment()
    for name in VARIABLES[:3]:
        os.environ.pop(name)
    monkeypatch.setenv("MASTER_ADDR", "node")
    monkeypatch.setenv("MASTER_PORT", "7")
    _fill_launcher_environment()
    assert [os.environ[name] for name in VARIABLES] == ["3", "4", "1", "node", "7"]


def test_a_batch_script_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert (launched_rank(), launched_world_size()) == (0, 1)
    _fill_launcher_environment()
    assert os.environ["WORLD_SIZE"] == "1"


def test_srun_tells_the_rank_before_the_group_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert (launched_rank(), launched_world_size()) == (3, 4)


@pytest.mark.parametrize(
    ("asked", "size", "expected"),
    [("auto", 1, False), ("auto", 2, True), ("synchronised", 1, False), ("local", 2, False)],
)
def test_batchnorm_across_ranks(asked: str, size: int, expected: bool) -> None:
    config = validate({"data": {"root": "x"}, "train": {"batch_norm": asked}})
    world = World(0, size, 0, torch.device("cpu"))
    assert synchronises_batch_norm(config, world) == expected
