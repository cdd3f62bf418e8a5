"""The package as pip installs it, away from the checkout."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from .support.runs import ISOFAST, ROOT, call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built wheel's packages, which Python finds first."""
    folder = tmp_path_factory.mktemp("wheel")
    # building leaves files in the source
    source = folder / "source"
    for name in ("isofast", "kernels", "launch"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    for project in (source, source / "kernels"):
        call([*pip, "--wheel-dir", str(folder), str(project)])
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.mark.long
def test_train_takes_a_shipped_config_by_name(
    installed: Path, digits: Path, tmp_path: Path
) -> None:
    command = [*ISOFAST, "train", "--config", "quickstart"]
    few = ("train.max_steps=2", "encoder.width=4", "evaluation.every_epochs=0")
    settings = (f"data.root={digits}", "data.threads=1", *few)
    command += [word for setting in settings for word in ("--set", setting)]
    path = {"PYTHONPATH": str(installed)}
    call(command, cwd=tmp_path, **path)
    run = tmp_path / "runs" / "quickstart"
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    # the same as the program of the checkout
    shown = call([*command, "--set", "train.max_steps=3"], cwd=tmp_path, **path).stderr
    assert "continuing from" in shown
    program = [sys.executable, str(ROOT / "launch" / "train.py"), *command[4:]]
    shown = call([*program, "--set", "train.max_steps=4"], cwd=tmp_path).stderr
    assert "continuing from" in shown
    call([*command, "--fresh"], cwd=tmp_path, **path)
    assert (tmp_path / "runs" / "quickstart-2" / "summary.json").is_file()

    wrong = call([*command[:4], "--config", "imagenet"], code=2, cwd=tmp_path, **path).stderr
    assert "no config file imagenet" in wrong and "tinyimagenet" in wrong
    where = "import isofast; print(isofast.__file__)"
    assert str(installed) in call([sys.executable, "-c", where], cwd=tmp_path, **path).stdout
