"""One and two processes agree on the same global batch, through gloo and the real engine."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import distributed_c10d

from isofast.config.load import load_config
from isofast.config.schema import Config
from isofast.data import images
from isofast.data.images import Images, check_images
from isofast.errors import UserError
from isofast.training.loop import fit
from isofast.training.parallel import close_world, init_world

from ..support.runs import TORCHRUN, forked, launched, timeless, train
from ..support.two_ranks import main

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "torchrun": TORCHRUN,
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
CASES = [("isoloss", "torchrun"), ("byol", "srun"), ("sigreg", "torchrun")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, digits: Path
) -> dict[int, dict[str, Any]]:
    """The results of one and two processes, by number of processes."""
    method, launcher = request.param
    folder = tmp_path_factory.mktemp("ranks")
    config = folder / "config.json"
    settings = {
        "data": {"dataset": "digits", "root": str(digits)},
        "encoder": {"width": 4},
        "projector": {"hidden": 32, "output": 16},
        "method": {"name": method, "decay": 0.5},
        "train": {"batch_size": 16, "epochs": 2, "precision": "fp32"},
    }
    config.write_text(json.dumps(settings))
    for size in (1, 2):
        files, environments = (config, folder / f"{size}.pt"), launched(size, LAUNCHERS[launcher])
        assert forked(main, *map(str, files), environments=environments) == [0] * size
    return {size: torch.load(folder / f"{size}.pt") for size in (1, 2)}


@pytest.mark.parametrize("step", [0, 1])
def test_loss_correlation_and_gradients_agree(results, step):
    one, two = results[1], results[2]
    names = [name for name in one if name.startswith((f"loss{step}", f"corr{step}", f"grad{step}"))]
    assert len(names) > 60
    for one_or_two in (one, two):
        corr_DD = one_or_two[f"corr{step}"]
        assert torch.equal(corr_DD, corr_DD.T)
    for name in names:
        if name.endswith(".bias") and one[name].abs().max() < 1e-6:
            continue  # rounding error: the BatchNorm that follows cancels the bias
        # 1e-4 of each entry, or of the tensor's largest entry where sums nearly cancel
        atol = 1e-4 * one[name].abs().max().item()
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=atol, msg=name)
        assert one[name].abs().max() > 0, name


def test_buffers_rows_and_objects_are_exchanged(results):
    two = results[2]
    assert torch.equal(two["buffers"], torch.full_like(two["buffers"], 0.5))
    assert two["rows"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    assert two["objects"] == [0, 1]


def test_ranks_agree_on_their_images_or_stop_together(results):
    first, last = results[2]["refused"]
    assert first[0] == last[0] == ""
    assert all("same images" in told for told in (first[1], last[1], first[4], last[4]))
    assert "gone.png" in last[2] and first[2] == f"rank 1: {last[2]}"
    assert "gone.png" in first[3] == last[3]
    # no other rank to differ from
    (alone,) = results[1]["refused"]
    assert alone[:2] == ["", ""] and alone[2] == alone[3] == first[3]


def test_ranks_have_one_config(results):
    first, last = results[2]["configs"]
    assert first == last and first[:2] == ["", ""]
    for told, key in zip(
        first[2:], ("optimizer.lr", "logging.every_steps", "data.crop"), strict=True
    ):
        assert f"rank 1 has a different configuration from rank 0's: {key}: " in told


def test_state_in_a_group_of_one(results):
    assert results[1]["steps restored"] == 3 and results[1]["clipping"] == 0
    assert "was on a cuda and is on a cpu" in results[1]["another device"]


def test_ranks_of_a_cpu_share_its_cores_unless_told():
    told = launched(2)
    silent = launched(2)
    for environment in silent:
        del environment["OMP_NUM_THREADS"]
    assert forked(_threads_are, 5, environments=told) == [0, 0]
    assert forked(_threads_are, 3, environments=silent) == [0, 0]
    # a process alone has what a container's CPU limit leaves of the machine
    for environment in (alone := launched(1)):
        del environment["OMP_NUM_THREADS"]
    assert forked(_threads_are, 4, 4, environments=alone) == [0]
    assert forked(_threads_are, 5, 6, environments=alone) == [0]


def _threads_are(expected: int, cores: int = 6) -> None:
    torch.set_num_threads(5)
    with mock.patch("isofast.distributed.usable_cores", return_value=cores):
        init_world()
    assert torch.get_num_threads() == expected
    close_world()


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(config_file, tmp_path):
    config = config_file(train={"max_steps": 12, "precision": "fp32"})
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    train(config, whole)
    train(config, grown, "--set", "train.max_steps=6")
    printed = train(config, grown, ranks=2)
    assert "the run had 1 process(es) and has 2 now" in printed
    losses = [[r["loss"] for r in timeless(run) if "loss" in r] for run in (whole, grown)]
    assert losses[0][:6] == losses[1][:6]
    assert losses[0][6:] != losses[1][6:]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.long
def test_a_check_may_take_longer_than_a_collective(config_file, tmp_path):
    config = config_file(train={"max_steps": 2})
    assert forked(_check_slowly, config, tmp_path / "run", environments=launched(2)) == [0, 0]


def _check_slowly(path: Path, run_dir: Path) -> None:
    limit = timedelta(seconds=15)

    def check(config: Config, listed: Images) -> Images:
        if os.environ["RANK"] == "0":
            time.sleep(20)
        return check_images(config, listed)

    with (
        mock.patch.object(images, "check_images", check),
        mock.patch.object(distributed_c10d, "default_pg_timeout", limit),
    ):
        torch.distributed.init_process_group("gloo", timeout=limit)
        assert fit(load_config(path), run_dir)["completed"]


@pytest.mark.long
def test_a_run_dir_that_machines_do_not_share_is_refused(config_file, tmp_path):
    """The second process would start at step 0 while the first continues from step 2."""
    config = config_file(train={"max_steps": 2})
    train(config, tmp_path / "0")
    codes = forked(_continue_in_a_folder_of_its_own, config, tmp_path, environments=launched(2))
    assert codes == [0, 0]


def _continue_in_a_folder_of_its_own(config: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="steps 0, 2; it must be one folder on a disk that all"):
        fit(load_config(config, ["train.max_steps=4"]), folder / os.environ["RANK"])
