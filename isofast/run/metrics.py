"""What a run records: metrics.jsonl and spectrum.npz, written whole and read back."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from isofast.data.files import write_atomically
from isofast.run.loggers import Logger, Record
from isofast.run.spectrum import Spectrum


@dataclass(frozen=True)
class Evaluation:
    """Top-1 of the online probe and of k-NN, fractions in [0, 1]."""

    val_top1: float
    knn_top1: float


class MetricsWriter:
    """Appends records; continues a run from ``step`` by dropping what was written after it.

    Args:
        run_dir: the run's folder.
        step: the step from which the run goes on; 0 for a new run (nothing is kept then).
        loggers: receive each record too.
        report: is told of records that are damaged; they are kept beside the new file.

    Attributes:
        spectra: those of ``spectrum.npz``, by step, in order.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        loggers: Sequence[Logger] = (),
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._spectrum_path = run_dir / "spectrum.npz"
        if step and _has_damage(self._path):
            report(_set_aside(self._path))
        kept = [record for record in read_metrics(self._path) if step and record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self._path, lambda path: path.write_text(text, encoding="utf-8"))
        self._file = self._path.open("a", encoding="utf-8")
        try:
            kept_spectra = read_spectra(self._spectrum_path) if step else {}
        except (ValueError, KeyError, EOFError, OSError, BadZipFile):
            report(_set_aside(self._spectrum_path))
            kept_spectra = {}
        self.spectra = {at: one for at, one in kept_spectra.items() if at <= step}
        self._loggers = loggers

    def write(self, record: Record) -> None:
        """Appends one record; NaN and infinity become null, which is what JSON has."""
        clean = {k: v if v is None or np.isfinite(v) else None for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.log(record)

    def spectrum(self, step: int, spectrum: Spectrum) -> None:
        """Keeps C's spectrum for ``flush``."""
        self.spectra[step] = spectrum

    def flush(self) -> None:
        """Writes spectrum.npz and whatever is buffered to the disk."""
        if self.spectra:
            arrays = _spectra_as_arrays(self.spectra)
            write_atomically(self._spectrum_path, lambda path: _save_npz(path, arrays))
        self._file.flush()
        os.fsync(self._file.fileno())
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._file.close()
        for logger in self._loggers:
            logger.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that a crash cut short or damaged is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [record for record in map(_record, lines) if record is not None]


def read_spectra(path: Path) -> dict[int, Spectrum]:
    """The spectra of a spectrum.npz by step, in order; none where there is no file.

    Raises:
        ValueError, KeyError, EOFError, OSError, BadZipFile: the file is damaged.
    """
    if not path.exists():
        return {}
    with np.load(path) as stored:
        steps, eigenvalues = stored["step"].tolist(), stored["eigenvalues"].astype(np.float32)
        # runs without a linear predictor have none
        alignments = (
            stored["alignment"].astype(np.float32) if "alignment" in stored else [None] * len(steps)
        )
    return {
        step: Spectrum(eigenvalues_D, alignment_D)
        for step, eigenvalues_D, alignment_D in zip(steps, eigenvalues, alignments, strict=True)
    }


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _has_damage(path: Path) -> bool:
    """Whether any line but the last, which a crash may cut short, is no record."""
    if not path.exists():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(_record(line) is None for line in lines[:-1])


def _set_aside(path: Path) -> str:
    """Copies a damaged file to NAME.damaged; gives what there is to say."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.copyfile(path, aside)
    return f"{path} is damaged; what can be read of it is kept, and the file as it was in {aside}"


def _save_npz(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _spectra_as_arrays(spectra: Mapping[int, Spectrum]) -> dict[str, Any]:
    """What spectrum.npz holds: step (T,), eigenvalues (T, D) and, where there is any, alignment."""
    arrays: dict[str, Any] = {
        "step": np.array([*spectra], dtype=np.int64),
        "eigenvalues": np.stack([spectrum.eigenvalues_D for spectrum in spectra.values()]),
    }
    if any(spectrum.alignment_D is not None for spectrum in spectra.values()):
        unknown = np.full_like(arrays["eigenvalues"][0], np.nan)
        arrays["alignment"] = np.stack(
            [unknown if s.alignment_D is None else s.alignment_D for s in spectra.values()]
        )
    return arrays
