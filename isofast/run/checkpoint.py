"""Checkpoints, written atomically; a run continues from the newest intact one.

A checkpoint is a folder step_00001000 with state.pt (everything the loop changes),
encoder.safetensors (the backbone, under torchvision's names) and manifest.json (sizes and
checksums). It is written under a temporary name and renamed when complete.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from isofast.data.files import sync
from isofast.errors import RunError, UserError, tell

State = dict[str, Any]
REMEDY = (
    "Earlier checkpoints, if any, are intact; free some space, then repeat the command to continue"
)
_STATE, _ENCODER, _MANIFEST = "state.pt", "encoder.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint on disk."""

    path: Path
    step: int

    def load(self) -> State:
        """Return the state, on the CPU."""
        state: State = torch.load(self.path / _STATE, map_location="cpu", weights_only=True)
        return state


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step_{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    state: State,
    encoder: dict[str, Tensor],
    keep: int,
    about: Mapping[str, str] | None = None,
    best_step: int | None = None,
) -> Path:
    """Write ``folder``/step_N, delete all but the ``keep`` newest and the best, and return it.

    Later ones, which were damaged and skipped on resume, stay until they are overwritten.

    Args:
        folder: the run's checkpoints folder.
        step: steps taken.
        state: tensors and plain Python values.
        encoder: the backbone's state dict.
        keep: checkpoints to keep, including this one.
        about: metadata of encoder.safetensors.
        best_step: step of a checkpoint that is always kept.

    Raises:
        RunError: the disk is full or not writable; older checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    part = folder / f".{path.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # also those of other steps, left by killed runs
        for unfinished in folder.glob(".step_*.part"):
            shutil.rmtree(unfinished, ignore_errors=True)
        part.mkdir()
        torch.save(state, part / _STATE)
        tensors = {k: v.detach().cpu().contiguous() for k, v in encoder.items()}
        # torchvision's BatchNorm counts batches, ours does not: two views per step
        counters = {
            name.replace("running_mean", "num_batches_tracked"): torch.tensor(2 * step)
            for name in tensors
            if name.endswith("running_mean")
        }
        # only their owner can read save_file's files
        encoded = save(counters | tensors, {"format": "pt", **(about or {})})
        (part / _ENCODER).write_bytes(encoded)
        manifest = {name: _fingerprint(part / name) for name in (_STATE, _ENCODER)}
        (part / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in (_STATE, _ENCODER, _MANIFEST):
            sync(part / name)
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
        sync(folder)
    # torch.save raises its own error on a full disk
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"could not write the checkpoint {path}: {error}. {REMEDY}") from error
    older = [old for old in _folders(folder) if _step_of(old) <= step]
    for old in older[keep:]:
        if _step_of(old) != best_step:
            shutil.rmtree(old, ignore_errors=True)
    return path


def _warn(text: str) -> None:
    tell(f"warning: {text}\n")


def newest_checkpoint(folder: Path, report: Callable[[str], None] = _warn) -> Checkpoint | None:
    """Return the newest checkpoint whose files match its manifest, or None without checkpoints.

    Call ``report`` with the reason for each one skipped; by default, print it on stderr.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    faults = []
    for path in _folders(folder):
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            if changed := [n for n in (_STATE, _ENCODER) if _fingerprint(path / n) != manifest[n]]:
                raise ValueError(f"{changed[0]} has changed since it was written")
            return Checkpoint(path, _step_of(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{type(error).__name__}: {error}")
            report(f"checkpoint {path} is damaged ({faults[-1]}); trying the one before")
    if faults:
        raise UserError(
            f"none of the {len(faults)} checkpoint(s) in {folder} is intact; fault of the newest: "
            f"{faults[0]}. Restore one, or start over in a new folder with --fresh"
        )
    return None


def encoder_file(source: Path) -> Path:
    """Return the encoder's file in a run's newest checkpoint, or ``source`` if it is not a run."""
    found = newest_checkpoint(source / "checkpoints") if source.is_dir() else None
    return source if found is None else found.path / _ENCODER


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
