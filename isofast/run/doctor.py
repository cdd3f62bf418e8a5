"""`isofast doctor`: whether training can run on this machine, and what is missing."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from isofast.distributed import usable_cores
from isofast.run.directory import cpu_has_bf16, cpu_name, version_of
from isofast_kernels import IsoLoss, matrix_power

# Errors of a wrong kernel are far larger; NUMERICS.md has the tolerance of each.
_TOLERANCE = 1e-3
_ROWS, _FEATURES = 256, 128
_IMPORT_S = 300


@dataclass(frozen=True)
class Package:
    """A library that training uses."""

    name: str
    version: str | None
    problem: str | None
    """Why it cannot be imported, and what to do."""
    required: bool


@dataclass(frozen=True)
class Device:
    """A device, and its kernels' relative errors against the float64 reference."""

    name: str
    kind: str
    memory_gb: float
    free_gb: float
    precisions: list[str]
    """Those with hardware support."""
    errors: dict[str, float]
    problem: str | None


@dataclass(frozen=True)
class Report:
    """The findings."""

    ok: bool
    verdict: str
    problems: list[str]
    """Why training cannot run."""
    notes: list[str]
    """What else is missing."""
    python: str
    platform: str
    packages: list[Package]
    devices: list[Device]
    driver: str | None
    cuda: str | None
    """The version that torch was built for."""
    cores: int
    """Usable ones: fewer than the machine's with a CPU limit, as of a container."""
    compiler: str | None
    disk_free_gb: float

    def __str__(self) -> str:
        """One line per finding, the verdict last."""
        lines = [f"{'Python':<20} {self.python}, {self.platform}"]
        for package in self.packages:
            lines.append(f"{package.name:<20} {package.version or 'not installed'}")
        for device in self.devices:
            errors = ", ".join(f"{name} {error:.1e}" for name, error in device.errors.items())
            lines += [
                f"{device.kind:<20} {device.name}, {device.free_gb:.1f} of {device.memory_gb:.1f} "
                f"GB free, {' and '.join(device.precisions)}",
                f"{'  kernels':<20} {device.problem or f'errors against float64: {errors}'}",
            ]
        lines += [
            f"{'driver':<20} {self.driver or 'none'}; torch is built for CUDA {self.cuda or '-'}",
            f"{'cores':<20} {self.cores}",
            f"{'C compiler':<20} {self.compiler or 'none'}",
            f"{'disk':<20} {self.disk_free_gb:.1f} GB free in {Path.cwd()}",
            *(f"note: {note}" for note in self.notes),
            *(f"problem: {problem}" for problem in self.problems),
            self.verdict,
        ]
        return "\n".join(lines)


def examine() -> Report:
    """Import every library, run kernels on every device, and judge."""
    cuda = torch.cuda.is_available()
    packages = _packages(cuda)
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count()) if cuda]
    devices = [_device(device) for device in (torch.device("cpu"), *gpus)]
    compiler = _compiler()
    driver = _driver()
    problems = [f"{p.name}: {p.problem}" for p in packages if p.problem and p.required]
    problems += [f"kernels on {d.name}: {d.problem}" for d in devices if d.problem]
    notes = [f"{p.name}: {p.problem}" for p in packages if p.problem and not p.required]
    if compiler is None:
        text = (
            "no C compiler or no Python.h, which Triton and torch.compile need: install gcc, g++ "
            "and this Python's headers (python3-dev)"
        )
        (problems if cuda else notes).append(text)
    if driver and not cuda:
        notes.append(
            f"driver {driver} is installed, but torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda or '-'}, finds no GPU. Install a torch that matches the driver"
        )
    names = [device.name for device in devices if device.kind == "GPU"]
    where = ", ".join(names) or "the CPU only, which suits small data sets"
    return Report(
        ok=not problems,
        verdict=f"training runs on {where}" if not problems else "training cannot run here",
        problems=problems,
        notes=notes,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        devices=devices,
        driver=driver,
        cuda=torch.version.cuda,
        cores=usable_cores(),
        compiler=compiler,
        disk_free_gb=round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
    )


def kernel_errors(device: torch.device) -> dict[str, float]:
    """Return relative errors of the loss, its gradient and the root of C, in fp32 on ``device``.

    They are measured against the float64 reference, in the Frobenius norm.
    """
    z_VBD = torch.randn(2, _ROWS, _FEATURES, generator=torch.Generator().manual_seed(0))

    def results(where: torch.device, dtype: torch.dtype) -> list[Tensor]:
        criterion = IsoLoss(_FEATURES, decay=0.0).to(where, dtype)
        leaf_VBD = z_VBD.to(where, dtype).requires_grad_()
        loss = criterion(*leaf_VBD)
        (dz_VBD,) = torch.autograd.grad(loss, leaf_VBD)
        return [loss.detach(), dz_VBD, matrix_power(criterion.corr_DD, 0.5)]

    exact = results(torch.device("cpu"), torch.float64)
    found = results(device, torch.float32)
    return {
        name: ((got.cpu().double() - truth).norm() / truth.norm()).item()
        for name, got, truth in zip(("loss", "gradient", "root"), found, exact, strict=True)
    }


def _packages(cuda: bool) -> list[Package]:
    """Import each library in a subprocess, which it may crash, and return the results."""
    wanted = [
        ("torchvision", "torchvision", "networks and official data sets", True),
        ("triton", "triton", "kernels on a GPU", cuda),
        # one process on a GPU runs its steps in a graph, without the engine
        ("deepspeed", "deepspeed", "several processes, or steps outside a CUDA graph", not cuda),
        (
            *("nvidia-dali-cuda130", "nvidia.dali.fn"),
            "decoding; without it, decoded images stay on the device",
            False,
        ),
    ]
    # as in training: without a GPU, DeepSpeed should not look for one
    env = os.environ | {"DS_ACCELERATOR": "cuda" if cuda else "cpu"}
    with ThreadPoolExecutor(len(wanted)) as pool:
        problems = pool.map(lambda one: _import_problem(one[1], env), wanted)
    # imported already
    own = [Package(n, version_of(n), None, True) for n in ("isofast", "isofast-kernels", "torch")]
    return own + [
        Package(
            name=name,
            version=version_of(name) or version_of(name.replace("cuda130", "cuda120")),
            problem=problem and f"{problem}. Needed for {purpose}: pip install {name}",
            required=required,
        )
        for (name, _, purpose, required), problem in zip(wanted, problems, strict=True)
    ]


def _import_problem(module: str, env: Mapping[str, str]) -> str | None:
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=_IMPORT_S)
    except subprocess.TimeoutExpired:
        return f"not imported within {_IMPORT_S} s"
    if done.returncode == 0:
        return None
    return done.stderr.strip().rpartition("\n")[2] or f"the import exits with {done.returncode}"


def _device(device: torch.device) -> Device:
    if device.type == "cuda":
        kind, name = "GPU", torch.cuda.get_device_name(device)
        free, total = 0, torch.cuda.get_device_properties(device).total_memory
        # fails on a full GPU, of which _tried says so
        with suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info(device)
        more = ["tf32", "bf16"] if torch.cuda.get_device_capability(device) >= (8, 0) else []
    else:
        kind, name = "CPU", cpu_name()
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
        more = ["bf16"] if cpu_has_bf16() else []
    total_gb, free_gb = round(total / 1e9, 1), round(free / 1e9, 1)
    return Device(name, kind, total_gb, free_gb, ["fp32", *more], *_tried(device))


def _tried(device: torch.device) -> tuple[dict[str, float], str | None]:
    """Return the kernels' errors, and what is wrong."""
    try:
        errors = kernel_errors(device)
    # from a compiler, a driver or a full GPU
    except Exception as error:
        return {}, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    wrong = [f"{name} is off by {e:.1e}" for name, e in errors.items() if not e <= _TOLERANCE]
    return errors, ", ".join(wrong) or None


def _compiler() -> str | None:
    """Return the C compiler that Triton uses; None without one or without Python's headers."""
    named = os.environ.get("CC")
    found = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return found if headers.is_file() else None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.partition("\n")[0].strip() or None
