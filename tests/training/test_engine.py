"""The launchers' environments, cores per rank, BatchNorm across ranks."""

import os
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from isofast.config.load import validate
from isofast.data import recipe_for
from isofast.data.images import check_images, list_images
from isofast.distributed import (
    TORCH_VARIABLES,
    World,
    cores_of_rank,
    launched_local_rank,
    launched_rank,
    launched_world_size,
    launcher_variables,
)
from isofast.errors import RankError, UserError
from isofast.training import parallel
from isofast.training.build import synchronises_batch_norm, train_loader

from ..data.conftest import numbered


@pytest.mark.parametrize(
    ("launched", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (2, 1, 4)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, (3, 1, 4)),
        # torchrun in each of two tasks
        (
            {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"},
            (2, 0, 4),
        ),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 0, 1)),
        # a batch script without srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 0, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            (3, 1, 4),
        ),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, (3, 1, 4)),
        # srun starts Intel MPI's proxies, whose variables their children inherit
        (
            {
                **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
                **{"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
            },
            (3, 1, 4),
        ),
        # srun --mpi=pmi2
        (
            {
                **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
                **{"PMI_RANK": "1", "PMI_SIZE": "2"},
            },
            (1, 1, 2),
        ),
    ],
)
def test_the_rank_is_known_before_the_group_exists(launched, expected, monkeypatch):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    found = launched_rank(), launched_local_rank(), launched_world_size()
    assert found == expected
    assert (launcher_variables() == TORCH_VARIABLES) == ("RANK" in launched or expected[2] == 1)


def test_a_group_of_another_size_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="has 2 processes, but the environment says 1"):
        launched_world_size()


@pytest.mark.parametrize(
    ("launched", "sharing"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"LOCAL_SIZE": "1"}, 1),
        ({"LOCAL_WORLD_SIZE": "64"}, 64),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "4"}, 4),
        # Slurm has bound the process to its cores
        ({"SLURM_STEP_NUM_TASKS": "8", "LOCAL_WORLD_SIZE": "8"}, 1),
        # a shell or a launcher that starts several ranks and has the cores of them all
        ({"SLURM_STEP_NUM_TASKS": "1", "LOCAL_SIZE": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "2", "LOCAL_WORLD_SIZE": "4"}, 4),
    ],
)
def test_cores_are_shared_with_the_neighbours(launched, sharing, monkeypatch):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    world = World(rank=0, size=8, local_rank=0, device=torch.device("cpu"))
    monkeypatch.setattr("isofast.distributed.usable_cores", lambda: 16)
    assert cores_of_rank(world) == max(1, 16 // sharing)


@pytest.mark.parametrize(
    ("launched", "visible", "gpu"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, 2, 1),
        # --gpus-per-task=1
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, 1, 0),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, 1, None),
    ],
)
def test_each_task_takes_its_own_gpu(launched, visible, gpu, monkeypatch):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    monkeypatch.setattr(os, "environ", {**os.environ, **address, **launched})
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    engine = SimpleNamespace(init_distributed=lambda **_: None)
    monkeypatch.setattr(parallel, "_import_deepspeed", lambda: engine)
    if gpu is None:
        with pytest.raises(RankError, match="1 visible"):
            parallel.init_world()
        return
    world = parallel.init_world()
    assert (world.rank, world.local_rank, world.device) == (1, 1, torch.device("cuda", gpu))
    # DeepSpeed moves the model there
    assert taken == [gpu] and os.environ["LOCAL_RANK"] == str(gpu)


def test_processes_without_an_address_are_told_what_to_set(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"says 2 processes, but MASTER_ADDR.* unset RANK"):
        parallel.init_world()


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_rank_that_waits_says_for_whom(local_rank, monkeypatch, capsys):
    """Also where a launcher's variables are left over."""
    alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "there", "MASTER_PORT": "29500"}
    local = {"LOCAL_RANK": "1"} if local_rank else {}
    monkeypatch.setattr(os, "environ", {**os.environ, **alone, **local})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parallel, "_PATIENCE_S", 0.0)
    engine = SimpleNamespace(ops=SimpleNamespace(), init_distributed=lambda **_: time.sleep(0.5))
    monkeypatch.setattr(parallel, "_import_deepspeed", lambda: engine)
    threads = torch.get_num_threads()
    with parallel.launcher_environment():
        parallel.init_world()
        # without LOCAL_RANK, as in Kubernetes, each process has a machine of its own
        assert os.environ.get("LOCAL_WORLD_SIZE") == (None if local_rank else "1")
    assert "LOCAL_WORLD_SIZE" not in os.environ
    torch.set_num_threads(threads)
    expected = (
        "" if local_rank else "rank 1 is waiting for all 2 processes to connect to there:29500"
    )
    assert capsys.readouterr().err.strip() == expected


@pytest.mark.parametrize("listens", [True, False])
def test_torchrun_itself_listens_for_a_single_process(listens, monkeypatch):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    monkeypatch.setattr(os, "environ", alone | {"TORCHELASTIC_USE_AGENT_STORE": str(listens)})
    parallel._fill_launcher_environment()
    assert os.environ["MASTER_PORT"] == ("29500" if listens else "0")


def test_each_rank_has_its_share_of_the_seeds_batch(small_config):
    images = numbered(check_images(small_config(), list_images(small_config())).train)

    def first(seed: int, rank: int, size: int) -> list[int]:
        config, world = small_config(seed=seed), World(rank, size, rank, torch.device("cpu"))
        loader = train_loader(config, world, images, recipe_for("digits"), dtype=torch.float32)
        with closing(loader):
            return next(loader).y_B.tolist()

    whole = first(3, 0, 1)
    assert first(3, 0, 2) + first(3, 1, 2) == whole != first(4, 0, 1)


@pytest.mark.parametrize(
    ("asked", "size", "expected"),
    [("auto", 1, False), ("auto", 2, True), ("synchronised", 1, False), ("local", 2, False)],
)
def test_batchnorm_across_ranks(asked, size, expected):
    config = validate({"data": {"root": "x"}, "train": {"batch_norm": asked}})
    world = World(0, size, 0, torch.device("cpu"))
    assert synchronises_batch_norm(config, world) == expected
