"""`isofast doctor`: what it finds here, and what it reports when something is missing."""

import json
import math
import os
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from isofast.run import doctor
from isofast.run.doctor import kernel_errors

from ..support.runs import ISOFAST, call

DOCTOR = [*ISOFAST, "doctor"]


def test_the_errors_are_those_of_fp32(monkeypatch):
    cpu = torch.device("cpu")
    errors = kernel_errors(cpu)
    assert errors.keys() == {"loss", "gradient", "root"}
    assert all(1e-9 < error < 1e-5 for error in errors.values())
    root = doctor.matrix_power
    wrong = {torch.float32: lambda corr_DD, alpha: corr_DD, torch.float64: root}
    monkeypatch.setattr(doctor, "matrix_power", lambda x_DD, alpha: wrong[x_DD.dtype](x_DD, alpha))
    assert kernel_errors(cpu)["root"] > 0.1

    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(doctor, "matrix_power", fails)
    report = doctor.Device("x", "CPU", 1, 1, [], *doctor._tried(cpu))
    assert report.errors == {} and report.problem == "RuntimeError: no compiler"
    monkeypatch.setattr(doctor, "_packages", lambda cuda: [])
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": "/no/where"})
    found = doctor.examine()
    assert not found.ok and "RuntimeError: no compiler" in found.problems[0]
    assert "no Python.h" in found.notes[0] and "driver 570.1 is installed" in found.notes[1]
    monkeypatch.setattr(doctor, "kernel_errors", lambda device: {"loss": math.nan, "root": 0.0})
    assert doctor._tried(cpu)[1] == "loss is off by nan"


def test_a_full_gpu_is_a_problem(monkeypatch):
    def fails(*_: object) -> dict[str, float]:
        raise torch.AcceleratorError("CUDA error: out of memory")

    known = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    monkeypatch.setattr(doctor, "kernel_errors", fails)
    device = doctor._device(torch.device("cuda", 0))
    assert (device.name, device.memory_gb, device.free_gb) == ("H100", 80, 0)
    assert "out of memory" in str(device.problem)


@pytest.mark.slow
def test_this_machine_can_train(tmp_path):
    report = json.loads(call([*DOCTOR, "--json"], cwd=tmp_path).stdout)
    assert report["ok"] is True and report["problems"] == []
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert versions["torch"] == version("torch") and versions["deepspeed"] == version("deepspeed")
    assert report["cores"] == len(os.sched_getaffinity(0))
    (device,) = report["devices"]
    assert device["kind"] == "CPU" and max(device["errors"].values()) < 1e-5
    assert "training runs on the CPU only" in report["verdict"]


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [False, True])
def test_one_process_on_a_gpu_needs_no_deepspeed(cuda):
    required = {package.name: package.required for package in doctor._packages(cuda)}
    assert required["deepspeed"] is not cuda and required["triton"] is cuda


@pytest.mark.slow
def test_what_is_missing_is_named_with_its_remedy(tmp_path):
    # these shadow the installed ones
    (tmp_path / "deepspeed.py").write_text("raise ImportError('libmpi.so.40: cannot open')")
    (tmp_path / "nvidia.py").write_text("")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('built for another torch')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = call(DOCTOR, code=1, PYTHONPATH=path, CC="no-such-compiler")
    for words in (
        "problem: deepspeed: ImportError: libmpi.so.40: cannot open. Needed for several processes",
        "pip install deepspeed",
        "problem: torchvision: RuntimeError: built for another torch. Needed for networks",
        "note: nvidia-dali-cuda130: ModuleNotFoundError",
        "pip install nvidia-dali-cuda130",
        "note: no C compiler",
    ):
        assert words in done.stdout
    assert done.stdout.endswith("training cannot run here\n")
    assert "error: training cannot run here" in done.stderr


@pytest.mark.slow
def test_what_isofast_itself_cannot_import_is_named(tmp_path):
    (tmp_path / "triton.py").write_text("raise RuntimeError('built for another torch')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = call([*DOCTOR, "--json"], code=1, PYTHONPATH=path)
    report = json.loads(done.stdout)
    assert report["ok"] is False and "built for another torch" in report["problems"][0]
    assert "built for another torch" in done.stderr and "Traceback" not in done.stderr
