"""Write metrics.jsonl and spectrum.npz, resume them after an interruption, read them back."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isofast.data.files import write_atomically, write_text
from isofast.errors import UserError
from isofast.run.loggers import Logger, Record
from isofast.run.spectrum import Spectrum


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracies of the online probe and of k-NN, fractions in [0, 1]."""

    val_top1: float
    knn_top1: float
    label_free: Callable[[], Record] = dict
    """Computes the rest of the record; the recorder calls it in the background."""


class MetricsWriter:
    """Appends records and spectra; drops those that an interrupted run wrote after ``step``.

    Args:
        run_dir: the run's folder.
        step: where the run resumes; a new run, at 0, keeps nothing.
        loggers: also receive each record; one that fails is dropped.
        report: called with a line for the user.

    Attributes:
        records: the records kept.

    Raises:
        UserError: spectrum.npz cannot be read.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        loggers: Sequence[Logger] = (),
        report: Callable[[str], None] = print,
    ) -> None:
        path, self._spectrum_path = run_dir / "metrics.jsonl", run_dir / "spectrum.npz"
        self.records = [one for one in read_metrics(path) if step and one["step"] <= step]
        spectra = read_spectra(self._spectrum_path) if step else {}
        self._spectra = {at: spectrum for at, spectrum in spectra.items() if at <= step}
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._loggers, self._report = [*loggers], report

    def write(self, record: Record) -> None:
        """Append a record; NaN and infinity, which JSON lacks, become null.

        On a full disk, the record waits for ``flush``.
        """
        clean = {k: v if v is None or np.isfinite(v) else None for k, v in record.items()}
        self._unwritten += json.dumps(clean).encode() + b"\n"
        with suppress(OSError):
            self._append()
        self._tell(lambda logger: logger.log({**record}))

    def spectrum(self, step: int, spectrum: Spectrum) -> None:
        """Keep C's spectrum for ``flush``."""
        self._spectra[step] = spectrum

    def flush(self) -> None:
        """Write spectrum.npz, and sync records and spectra to disk.

        Raises:
            OSError: the disk is full; nothing is lost, and the next flush tries again.
        """
        self._append()
        if self._spectra:
            write_atomically(self._spectrum_path, self._save_spectra)
        os.fsync(self._file.fileno())
        self._tell(lambda logger: logger.flush())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()
        self._tell(lambda logger: logger.close())

    def _append(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _tell(self, what: Callable[[Logger], None]) -> None:
        for logger in [*self._loggers]:
            try:
                what(logger)
            # a library's own errors
            except Exception as error:
                self._loggers.remove(logger)
                self._report(f"warning: {type(logger).__name__} receives no more records ({error})")

    def _save_spectra(self, path: Path) -> None:
        """Write step (T,), eigenvalues (T, D) and, if any is known, alignment (T, D)."""
        spectra = self._spectra.values()
        eigenvalues_TD = np.stack([spectrum.eigenvalues_D for spectrum in spectra])
        arrays: dict[str, Any] = {"step": np.array([*self._spectra]), "eigenvalues": eigenvalues_TD}
        alignments = [spectrum.alignment_D for spectrum in spectra]
        if any(alignment_D is not None for alignment_D in alignments):
            unknown_D = np.full_like(eigenvalues_TD[0], np.nan)
            arrays["alignment"] = np.stack([unknown_D if a is None else a for a in alignments])
        # not compressed: on the thousands of spectra of a long run, zlib takes seconds to save 10 %
        np.savez(path, **arrays)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records in a metrics.jsonl, skipping lines that a crash cut short."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError, TypeError, KeyError):
                record = json.loads(line)
                records += [record] if isinstance(record["step"], int) else []
    return records


def read_spectra(path: Path) -> dict[int, Spectrum]:
    """Return the spectra in a spectrum.npz by step, in order; none without a file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with np.load(path) as stored:
            steps, eigenvalues = stored["step"].tolist(), stored["eigenvalues"].astype(np.float32)
            # only runs with a linear predictor have alignments
            alignments = stored["alignment"].astype(np.float32) if "alignment" in stored else None
        return {
            step: Spectrum(eigenvalues[t], None if alignments is None else alignments[t])
            for t, step in enumerate(steps)
        }
    # NumPy and zipfile raise nearly anything for damaged files
    except Exception as error:
        raise UserError(
            f"cannot read {path}: {error}; restore it, or move it away to continue without the "
            f"earlier eigenvalues"
        ) from None
