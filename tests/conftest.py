"""Shared fixtures: real digits on disk, small configurations, the command line in-process."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isofast.cli import main
from isofast.config.load import validate
from isofast.config.presets import merge
from isofast.config.schema import Config
from isofast.data.prepare import prepare
from isofast.paper.tables import Request

from .support.runs import fit_apart

SMALL: dict[str, Any] = {
    "data": {"dataset": "digits", "backend": "dali", "threads": 1},
    "encoder": {"width": 4},
    "projector": {"hidden": 32, "output": 16},
    "optimizer": {"name": "adamw", "lr": 4e-3},
    "train": {"epochs": 2, "batch_size": 64, "max_steps": 6},
    "evaluation": {"every_epochs": 0},
    "checkpoint": {"every_steps": 2},
    "logging": {"every_steps": 1, "loggers": []},
}


# set by the code under test, too
RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs except in `pytest -m gpu`, and any launcher that started pytest.

    Use one thread, as CPU results are compared bitwise.
    """
    torch.set_num_threads(1)
    for name in [*os.environ]:
        if name in RANK_VARIABLES or name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_")):
            del os.environ[name]
    marks = config.getoption("markexpr")
    if "gpu" not in marks or "not gpu" in marks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide other tests' process groups."""
    for name in RANK_VARIABLES:
        # set first, so that monkeypatch also undoes what the code under test sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared digits data set."""
    root = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", root)
    return root


@pytest.fixture
def own_digits(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits that a test may damage."""
    return shutil.copytree(digits, tmp_path / "digits")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A 3 MB file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, which must exit with 2 and print ``words`` to stderr; returns its stdout."""

    def check(arguments: Iterable[object], *words: str) -> str:
        capsys.readouterr()
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        assert code == 2 and "Traceback" not in err
        assert all(word in err for word in words), (words, err)
        return out

    return check


@pytest.fixture
def small(digits: Path) -> Callable[..., dict[str, Any]]:
    """Settings for a run of a few seconds; keyword arguments are sections merged over them."""

    def make(**sections: Any) -> dict[str, Any]:
        return merge(merge(SMALL, {"data": {"root": str(digits)}}), sections)

    return make


@pytest.fixture
def small_config(small: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    """The settings of ``small``, validated."""
    return lambda **sections: validate(small(**sections))


@pytest.fixture
def config_file(tmp_path: Path, small: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """The settings of ``small``, written to a file."""

    def write(**sections: Any) -> Path:
        path = tmp_path / "small.json"
        path.write_text(json.dumps(small(**sections)))
        return path

    return write


@pytest.fixture(scope="session")
def spectrum_runs(
    digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], Path]]:
    """Finished runs of 24 steps (22 per epoch), by name: their settings and folders."""
    own: dict[str, dict[str, Any]] = {
        "linear": {
            "method": {"name": "linear"},
            "optimizer": {"weight_decay": 0.05},
            "logging": {"spectrum_every_steps": 8},
        },
        "ema": {},
        "no ema": {"method": {"ema": False}},
    }
    shared = {
        "data": {"root": str(digits)},
        "train": {"max_steps": 24},
        "checkpoint": {"every_steps": 12},
        "logging": {"every_steps": 10},
    }
    runs = {}
    for name, sections in own.items():
        settings = merge(merge(SMALL, shared), sections)
        run_dir = tmp_path_factory.mktemp("runs") / name.replace(" ", "-")
        fit_apart(settings, run_dir)
        runs[name] = (settings, run_dir)
    return runs


@pytest.fixture(scope="session")
def evaluated_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 44 steps, evaluated before training and after each of its two epochs."""
    changes = {
        "data": {"root": str(digits)},
        "train": {"max_steps": None, "precision": "fp32"},
        "evaluation": {"every_epochs": 1, "at_start": True},
        "checkpoint": {"every_steps": 22},
    }
    run_dir = tmp_path_factory.mktemp("runs") / "evaluated"
    fit_apart(merge(SMALL, changes), run_dir)
    return run_dir


@pytest.fixture
def request_of(digits: Path, tmp_path: Path) -> Callable[..., Request]:
    """A request for table 2 on the digits; keyword arguments override its fields."""

    def make(**changes: Any) -> Request:
        given = {"table": "table2", "datasets": ["digits"], "root": digits.parent}
        return Request(**(given | {"runs": tmp_path / "runs"} | changes))

    return make
