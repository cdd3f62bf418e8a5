"""The package as installed by pip, outside the checkout."""

import json
import shutil
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from .support.runs import ISOFAST, ROOT, call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages from the built wheels, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("wheel")
    # building leaves files in the source tree, so build a copy
    source = folder / "source"
    skipped = shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    for name in ("isofast", "kernels", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    for project in (source, source / "kernels"):
        call([*pip, "--wheel-dir", str(folder), str(project)])
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.mark.long
def test_train_takes_a_shipped_config_by_name(installed, digits, tmp_path):
    command = [*ISOFAST, "train", "--config", "quickstart"]
    few = ("train.max_steps=2", "encoder.width=4", "evaluation.every_epochs=0")
    settings = (f"data.root={digits}", "data.threads=1", *few)
    command += [word for setting in settings for word in ("--set", setting)]
    path = {"PYTHONPATH": str(installed)}
    call(command, cwd=tmp_path, **path)
    run = tmp_path / "runs" / "quickstart"
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    # interchangeable with launch/train.py in the checkout
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


IMPORT = """
import importlib.util, sys
if sys.argv[2] == "without":
    sys.modules["triton"] = None
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
else:
    import triton
import torch
before = {name.partition(".")[0] for name in sys.modules}
import isofast_kernels
new = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
assert new == {"isofast_kernels"}, new
assert isofast_kernels.__file__.startswith(sys.argv[1]), isofast_kernels.__file__
z = torch.randn(2, 8, 4, requires_grad=True)
isofast_kernels.IsoLoss(4)(*z).backward()
assert z.grad.isfinite().all()
"""


def test_the_kernels_need_torch_and_on_a_gpu_triton(installed, tmp_path):
    (found,) = metadata.distributions(name="isofast_kernels", path=[str(installed)])
    assert sorted(need.partition(">")[0] for need in found.requires) == ["torch", "triton"]
    for triton in ("with", "without"):
        command = [sys.executable, "-c", IMPORT, str(installed), triton]
        call(command, cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_pinned_packages_accept_any_python_3_11():
    # Debian 12's is 3.11.2
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    needs = {name: metadata.metadata(name).get("Requires-Python") for name in pins}
    assert [name for name, need in needs.items() if "3.11.0" not in SpecifierSet(need or "")] == []
