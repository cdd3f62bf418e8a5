"""User errors: exit code 2, a message with the remedy, nothing lost."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isofast.errors import UserError, exit_code_of
from isofast.training.loop import fit

from ..support.runs import call, command_of, train

pytestmark = pytest.mark.slow

Write = Callable[..., Path]


def test_fit_within_autocast_is_refused(small_config, tmp_path):
    with torch.autocast("cpu"), pytest.raises(UserError, match=r"outside torch\.autocast"):
        fit(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_machines_first_rank_prints_a_users_error(capsys):
    def command() -> None:
        raise UserError("no data here")

    for rank, local_rank, said in ((0, 0, "error: no"), (8, 0, "error on rank 8: no"), (9, 1, "")):
        assert exit_code_of(command, debug=False, rank=rank, local_rank=local_rank) == 2
        printed = capsys.readouterr().err
        assert said in printed and bool(said) == bool(printed)


@pytest.fixture
def refuses(refused: Any, config_file: Write, tmp_path: Path) -> Callable[..., None]:
    """Trains with a run dir or a setting that must be refused with the given words."""

    def check(*words: str, setting: str = "seed=0", run_dir: Path | None = None) -> None:
        where = ["--config", config_file(), "--run-dir", run_dir or tmp_path / "run"]
        refused(["train", *where, "--set", setting], *words)
        # nothing was written, so that the corrected command is not refused
        assert not (tmp_path / "run" / "config.json").exists()

    return check


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("method.alhpa=1", ["method.alhpa: unknown key", "method.alpha"]),
        ("data.root=/no/where", ["/no/where", "isofast prepare"]),
        ("train.batch_size=2000", ["1442", "2000"]),
        ('deepspeed={"train_batch_size": 3}', ["train.batch_size"]),
        ('deepspeed={"bf16": {"enabled": true}}', ["train.precision"]),
        ('deepspeed={"zero_optimization": {"stage": 1}}', ["stage must be 0"]),
    ],
)
def test_settings_that_cannot_be(refuses, setting, words):
    refuses(*words, setting=setting)


def test_srun_without_an_address(refuses, monkeypatch):
    for name, value in (("STEP_NUM_TASKS", "4"), ("PROCID", "0"), ("LOCALID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    refuses("says 4 processes, but MASTER_ADDR or MASTER_PORT is not set")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    refuses("| head -n 1)) and MASTER_PORT=29500")


def test_the_launcher_passes_the_exit_code_on(config_file, tmp_path):
    option = ("--set", "train.batch_size=63")
    command = command_of(config_file(), tmp_path / "run", *option, ranks=2)
    printed = call(command, code=2).stderr
    assert printed.count("got 63 for 2 processes") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_dir_that_is_something_else(refuses, tmp_path):
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"x")
    refuses("not a run", run_dir=folder)
    for run_dir in (folder / "photo.jpg", folder / "photo.jpg" / "run"):
        refuses("cannot write", run_dir=run_dir)
    refuses("File name too long", run_dir=folder / ("x" * 300))
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]


def test_a_run_that_has_not_begun_can_begin_with_other_settings(config_file, tmp_path):
    loggers = '["tensorboard", "no_logger:Here"]'
    options = ("--set", f"logging.loggers={loggers}")
    assert "cannot start 'no_logger:Here'" in train(config_file(), tmp_path / "r", *options, code=2)
    assert (tmp_path / "r" / "tensorboard").is_dir()
    assert "steps 0 to 1," in train(config_file(train={"max_steps": 1}, seed=3), tmp_path / "r")


@pytest.mark.parametrize("section", [{"flops_profiler": 3}, {"communication_data_type": "xyz"}])
def test_what_deepspeed_refuses(config_file, tmp_path, section):
    printed = train(config_file(deepspeed=section), tmp_path / "run", code=2)
    assert "DeepSpeed refused" in printed and str(section) in printed


def test_a_port_that_is_taken(config_file, tmp_path):
    command = command_of(config_file(train={"max_steps": 1}), tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        assert "--master_port" in call(command, code=2, WORLD_SIZE="2", **env).stderr
        # a single process needs none
        call(command, WORLD_SIZE="1", **env)
