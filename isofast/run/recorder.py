"""Records, progress and timing of a running process."""

import math
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from isofast.config.schema import Config, to_json
from isofast.data.files import write_json, write_text
from isofast.distributed import World
from isofast.run.background import Background, HostCopy
from isofast.run.collapse import CollapseWatch, Finding
from isofast.run.loggers import Record, make_loggers
from isofast.run.metrics import Evaluation, MetricsWriter
from isofast.run.progress import Progress
from isofast.run.spectrum import Spectrum, measure
from isofast.run.summary import Summary, results_table


@dataclass
class Totals:
    """What a run accumulates across restarts; saved with each checkpoint."""

    wall_s: float = 0.0
    train_s: float = 0.0
    val_top1: float | None = None
    knn_top1: float | None = None
    knn_top1_initial: float | None = None
    knn_top1_pixels: float | None = None
    knn_top1_best: float | None = None
    best_step: int | None = None
    collapse: str | None = None


@dataclass
class _Lap:
    """The time since the last record: start, seconds spent waiting for data, steps."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0


class Recorder:
    """Records, progress and timing of one rank; only the main rank writes and prints.

    Args:
        run_dir: the run's folder; config.json and environment.json are written at once.
        config: the run's configuration.
        world: rank, world size and device.
        environment: the content of environment.json.
        totals: those saved at ``step``.
        step: where the run resumes; later records are dropped.
        last_step: where the run ends.
        steps_per_epoch: steps in one pass over the images.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        world: World,
        environment: dict[str, Any],
        totals: Totals,
        *,
        step: int,
        last_step: int,
        steps_per_epoch: int,
    ) -> None:
        self.totals = totals
        self.progress = Progress(last_step, min(step, last_step), world.is_main)
        self._run_dir, self._environment = run_dir, environment
        self._batch_size = config.train.batch_size
        self._steps_per_epoch = steps_per_epoch
        self._background = Background(one_core=world.device.type == "cpu")
        self._spectrum: Future[Spectrum] | None = None
        self._finding: Future[Finding | None] | None = None
        self._watch = CollapseWatch(config, steps_per_epoch)
        self._writer: MetricsWriter | None = None
        if world.is_main:
            # first, because one that fails ends a run that has not begun
            loggers = make_loggers(run_dir, config, step)
            write_text(run_dir / "config.json", to_json(config))
            write_json(run_dir / "environment.json", environment)
            if step < last_step:
                (run_dir / "summary.json").unlink(missing_ok=True)
            self._writer = MetricsWriter(run_dir, step, loggers, self.progress.say)
            for record in self._writer.records:
                if "embedding_std" in record:
                    self._watch.judge(record)
        self._began = time.perf_counter()
        self._lap = _Lap()

    def stepped(self, waited_s: float = 0.0) -> None:
        """Count a step, and the seconds it waited for its batch."""
        self._lap.steps += 1
        self._lap.waited += waited_s

    def resume_clock(self) -> None:
        """Restart the timer, excluding time since the last record."""
        self._lap = _Lap()

    def stop_clock(self) -> _Lap:
        """Add the current lap to the total, start a new one, and return the old one."""
        lap, self._lap = self._lap, _Lap()
        if lap.steps:
            self.totals.train_s += self._lap.began - lap.began
        return lap

    def spectrum(self, step: int, corr_DD: Tensor, w_DD: Tensor | None) -> None:
        """Record the spectrum of C (D, D), and a trained W's alignment, without waiting."""
        if self._writer is None:
            return
        writer, corr = self._writer, HostCopy(corr_DD)
        w = None if w_DD is None else HostCopy(w_DD)

        def work() -> Spectrum:
            spectrum = measure(corr.get(), None if w is None else w.get())
            writer.spectrum(step, spectrum)
            return spectrum

        self._spectrum = self._background.do(work)

    def training(self, step: int, values: Record) -> None:
        """Write and show a step's ``values`` and speed, with the last spectrum's ranks."""
        lap = self.stop_clock()
        elapsed = self._lap.began - lap.began
        speed = {
            "images_per_s": lap.steps * self._batch_size / elapsed,
            "data_wait": lap.waited / elapsed,
        }
        # a method's scalars may have any name
        place: Record = {"step": step, "epoch": self._epoch(step)}
        record = place | values | speed | place
        if self._spectrum is not None:
            self._finding = self._background.do(partial(self._write, record, self._spectrum))
        shown = {
            "images/s": f"{speed['images_per_s']:,.0f}",
            "loss": f"{values['loss']:.3f}",
            **({} if (top1 := values["probe_top1"]) is None else {"probe": f"{top1:.3f}"}),
            "wait": f"{speed['data_wait']:.0%}",
        }
        self.progress.advance(step, shown)

    def evaluation(self, step: int, result: Evaluation) -> bool:
        """Write and show an evaluation; return whether its k-NN is the best yet (not step 0)."""
        self.totals.val_top1, self.totals.knn_top1 = result.val_top1, result.knn_top1
        if step == 0:
            self.totals.knn_top1_initial = result.knn_top1
        if self._writer is not None:
            writer = self._writer
            record: Record = {"step": step, "epoch": self._epoch(step)}
            record |= {"val_top1": result.val_top1, "knn_top1": result.knn_top1}
            self._background.do(lambda: writer.write(record | result.label_free()))
        self.progress.say(
            f"epoch {self._epoch(step):g}: validation top-1 {result.val_top1:.3f}, "
            f"k-NN {result.knn_top1:.3f}"
        )
        best = step > 0 and result.knn_top1 >= (self.totals.knn_top1_best or 0.0)
        if best:
            self.totals.knn_top1_best, self.totals.best_step = result.knn_top1, step
        return best

    def finding(self) -> Finding | None:
        """Return the collapse that the last record shows, if any; always None except on rank 0.

        Wait for that record, which is usually written long before the next one is due.
        """
        return None if self._finding is None else self._finding.result()

    def note_collapse(self, message: str) -> None:
        """Note for summary.json that a collapse ends the run."""
        self._background.wait()
        self.totals.collapse = message

    def flush(self) -> tuple[Totals, Future[OSError | None]]:
        """Return the totals so far, and a future of the error, if any, in writing all records."""
        self._background.wait()
        wall_s = self.totals.wall_s + time.perf_counter() - self._began
        return replace(self.totals, wall_s=wall_s), self._background.do(self._flush)

    def summary(self, step: int, corr_DD: Tensor, dropped: int, failure: str | None) -> Summary:
        """Write summary.json; without ``failure``, the run is complete: print the results table."""
        so_far, written = self.flush()
        if (error := written.result()) is not None:
            raise error
        totals = asdict(so_far)
        train_s = totals.pop("train_s")
        rank = measure(corr_DD.cpu()).effective_rank
        summary: Summary = {
            "completed": failure is None,
            "failure": failure,
            "epochs": self._epoch(step),
            "steps": step,
            "effective_rank": rank if math.isfinite(rank) else None,
            "images_per_s": step * self._batch_size / train_s if train_s else None,
            "dropped_images_per_epoch": dropped,
            **totals,
        }
        if self._writer is not None:
            write_json(self._run_dir / "summary.json", summary)
        self.progress.close()
        if failure is None:
            table = results_table(self._run_dir, summary, self._environment)
            warning = f"\nwarning: {self.totals.collapse}" if self.totals.collapse else ""
            self.progress.say(f"\n{self._run_dir}: completed\n\n{table}{warning}\n")
        return summary

    def close(self) -> None:
        """Close the files, the bar and the background thread."""
        self.progress.close()
        self._background.close()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> OSError | None:
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            return error
        return None

    def _epoch(self, step: int) -> float:
        return float(f"{step / self._steps_per_epoch:.6g}")

    def _write(self, record: Record, measured: Future[Spectrum]) -> Finding | None:
        """Write a record with the spectrum's effective ranks; return the collapse it shows."""
        assert self._writer is not None
        spectrum = measured.result()
        record["effective_rank"] = spectrum.effective_rank
        record["effective_rank_entropy"] = spectrum.effective_rank_entropy
        if (alignment := spectrum.predictor_alignment) is not None:
            record["predictor_alignment"] = alignment
        self._writer.write(record)
        finding = self._watch.judge(record)
        self.totals.collapse = None if finding is None else finding.message
        return finding
