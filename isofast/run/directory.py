"""Run folders: choose, check and lock them, and describe the environment."""

import fcntl
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from isofast.config.load import read_stored
from isofast.config.schema import Config, changed_keys
from isofast.distributed import World
from isofast.errors import UserError, tell

_PACKAGES = (
    *("torch", "torchvision", "triton", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("numpy", "pydantic", "isofast", "isofast-kernels"),
)
# until the processes on a lost machine have ended, or a file server frees their lock
_WAIT_S = 180


def choose_run_dir(config_path: Path, run_dir: Path | None, fresh: bool) -> Path:
    """Return ``run_dir``, or runs/NAME for config NAME; if ``fresh``, a new one next to it.

    Jobs requeued by Slurm repeat their command, so they continue in the one that they began.
    """
    new = run_dir or Path("runs") / config_path.stem
    if not fresh:
        return new
    new = Path(os.path.abspath(new)) if new.name in ("", "..") else new
    begun, first, number = None, new.name, 1
    while new.exists():
        lock = new / ".lock"
        if _requeued() and lock.exists() and lock.read_text(encoding="utf-8") == _job():
            begun = new
        number += 1
        new = new.with_name(f"{first}-{number}")
    return begun or new


def open_run_dir(run_dir: Path, config: Config) -> IO[str]:
    """Create and lock the folder, or check that ``config`` continues the run in it.

    A job requeued by Slurm waits for a lock that its former processes may still hold.

    Returns:
        The lock, held until it is closed or the process ends.

    Raises:
        UserError: the folder contains something else, another config, or a run in progress.
    """
    stored = run_dir / "config.json"
    if stored.exists():
        _refuse_other_config(stored, config)
    # a logger that failed to start leaves its folder
    elif run_dir.is_dir() and any(
        path.name[0] != "." and path.name not in ("tensorboard", "wandb")
        for path in run_dir.iterdir()
    ):
        raise UserError(
            f"{run_dir} has files but no config.json, so it is not a run; use another --run-dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error}; use another --run-dir") from None
    held = f"another process is training in {run_dir}"
    for left in range(_WAIT_S if _requeued() else 0, -1, -1):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not left:
                lock.close()
                raise UserError(f"{held}; wait for it, or use another --run-dir") from None
        except OSError:
            # some network file systems have no locks; train without one
            break
        if left == _WAIT_S:
            tell(f"{held}; waiting up to {_WAIT_S} s for it to end\n")
        time.sleep(1)
    lock.seek(0)
    # other ranks may be reading it
    if lock.read() != _job():
        lock.truncate(0)
        lock.write(_job())
        lock.flush()
    for part in run_dir.glob(".*.part*"):
        part.unlink()
    return lock


def describe_environment(world: World, **resolved: str) -> dict[str, Any]:
    """Return the versions, device and commit behind a run's numbers.

    Args:
        world: rank, world size and device.
        resolved: what each "auto" in the config resolved to, by name.
    """
    cuda = world.device.type == "cuda"
    return {
        "versions": {name: version_of(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(world.device) if cuda else cpu_name(),
        "cuda": torch.version.cuda if cuda else None,
        "torch_threads": torch.get_num_threads(),
        "ranks": world.size,
        **resolved,
        "commit": _commit(),
        "command": sys.argv,
    }


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _requeued() -> bool:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _refuse_other_config(stored: Path, config: Config) -> None:
    remedy = "restore the old values, use another --run-dir, or start over next to it with --fresh"
    try:
        old = read_stored(stored)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {stored}: {error}; {remedy}") from None
    if changes := changed_keys(old, config):
        listed = "\n  ".join(changes)
        longer = f" To train longer, start another run with encoder.init={stored.parent}."
        raise UserError(
            f"{stored.parent} contains a run with another configuration:\n  {listed}\n"
            f"To continue, {remedy}.{longer * (old.train.epochs < config.train.epochs)}"
        )


def version_of(package: str) -> str | None:
    """Return a distribution's version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the CPU model."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions; without them, autocast only costs time."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _commit() -> str | None:
    """Return the source tree's commit, with + if tracked files differ; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # not that of a repository around the environment that isofast is installed in
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
