"""The folder of a run: made, recognised, locked, continued or refused."""

import fcntl
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from isofast.config.load import read_stored
from isofast.config.schema import Config, changed_keys
from isofast.data.files import write_atomically
from isofast.distributed import World
from isofast.errors import UserError

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "nvidia-dali-cuda130",
    "numpy",
    "pydantic",
    "isofast",
)


def choose_run_dir(config_path: Path, run_dir: Path | None, fresh: bool) -> Path:
    """``run_dir``, by default runs/NAME of the config file; with ``fresh`` a new one beside it."""
    chosen = run_dir or Path("runs") / config_path.stem
    if not fresh or not chosen.exists():
        return chosen
    number = 2
    while (numbered := chosen.with_name(f"{chosen.name}-{number}")).exists():
        number += 1
    return numbered


def open_run_dir(run_dir: Path, config: Config) -> IO[str]:
    """Makes the folder, or checks that ``config`` continues what is in it; locks it.

    Returns:
        The lock; the folder is this process's until it is closed or the process ends.

    Raises:
        UserError: the folder holds something else, another config, or a run that is going on.
    """
    stored = run_dir / "config.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file; name a folder")
    if run_dir.is_dir() and not stored.exists() and _has_foreign_files(run_dir):
        raise UserError(
            f"{run_dir} holds files but no config.json, so it is not a run; name another --run-dir"
        )
    if stored.exists():
        _refuse_other_config(stored, config)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error}; name another --run-dir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"another process is training in {run_dir}; wait for it, or name another --run-dir"
        ) from None
    except OSError:
        # some network file systems have no locks, which is no reason not to train
        pass
    for part in run_dir.glob(".*.part"):
        part.unlink()
    return lock


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content``, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def describe_environment(world: World, **resolved: str) -> dict[str, Any]:
    """Versions, device, commit: what a reader needs to place a run's numbers.

    Args:
        world: this process among its peers.
        resolved: what "auto" in the config has become, by name.
    """
    device = world.device
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "torch_threads": torch.get_num_threads(),
        "ranks": world.size,
        **resolved,
        "commit": _commit(),
        "command": sys.argv,
    }


def _refuse_other_config(stored: Path, config: Config) -> None:
    remedy = (
        "give the old values back, name another --run-dir, or start over beside it with --fresh"
    )
    try:
        old = read_stored(stored)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {stored}: {error}; {remedy}") from None
    changes = changed_keys(old, config)
    if changes:
        raise UserError(
            f"{stored.parent} holds a run of another configuration:\n  "
            + "\n  ".join(changes)
            + f"\nTo go on, {remedy}."
        )


def _has_foreign_files(run_dir: Path) -> bool:
    return any(not path.name.startswith(".") for path in run_dir.iterdir())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, with + where files differ from it; None outside git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
