"""What a run writes and shows while it goes on, and the time it takes."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from isofast.config import Config, to_json
from isofast.distributed import World
from isofast.evaluate import Evaluation
from isofast.files import write_atomically
from isofast.metrics import MetricsWriter, Record, effective_rank
from isofast.progress import Progress
from isofast.rundir import write_json
from isofast.summary import Summary, results_table


@dataclass
class Totals:
    """What a run adds up over all its processes, saved with each checkpoint."""

    wall_s: float = 0.0
    train_s: float = 0.0
    val_top1: float | None = None
    knn_top1: float | None = None
    knn_top1_initial: float | None = None
    knn_top1_pixels: float | None = None


@dataclass
class _Lap:
    """The time since the last record, how much of it was spent waiting for data, the steps."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0


class Recorder:
    """Records, progress and timing of one process; only the first of a group writes and prints.

    Args:
        run_dir: the run's folder; config.json and environment.json are written at once.
        config: the run's.
        world: this process among its peers.
        environment: what is in environment.json.
        totals: of the processes that took the run to ``step``.
        step: where the run goes on; records after it are dropped.
        last_step: where it ends.
        steps_per_epoch: steps of one pass over the images.
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
        self._run_dir = run_dir
        self._environment = environment
        self._batch_size = config.train.batch_size
        self._steps_per_epoch = steps_per_epoch
        self.progress = Progress(last_step, min(step, last_step), world.is_main)
        self._writer: MetricsWriter | None = None
        if world.is_main:
            text = to_json(config)
            write_atomically(
                run_dir / "config.json", lambda path: path.write_text(text, encoding="utf-8")
            )
            write_json(run_dir / "environment.json", environment)
            if step < last_step:
                (run_dir / "summary.json").unlink(missing_ok=True)
            self._writer = MetricsWriter(
                run_dir, step, config.logging.tensorboard, self.progress.say
            )
        self._began = time.perf_counter()
        self._lap = _Lap()

    def waited(self, seconds: float) -> None:
        """A batch was waited for."""
        self._lap.waited += seconds

    def stepped(self) -> None:
        """A step is done."""
        self._lap.steps += 1

    def resume_clock(self) -> None:
        """What follows is training again; what came since the last record was not."""
        self._lap = _Lap()

    def stop_clock(self) -> _Lap:
        """Ends a lap of training and adds it up; another begins."""
        lap, self._lap = self._lap, _Lap()
        if lap.steps:
            self.totals.train_s += self._lap.began - lap.began
        return lap

    def training(self, step: int, values: Record, eigenvalues_D: Tensor) -> None:
        """Writes and shows a step's record: ``values`` with the speed since the last one."""
        lap = self.stop_clock()
        elapsed = self._lap.began - lap.began
        images_per_s = lap.steps * self._batch_size / elapsed
        data_wait = lap.waited / elapsed
        record: Record = {
            "step": step,
            "epoch": self.epoch(step),
            **values,
            "images_per_s": images_per_s,
            "data_wait": data_wait,
            "effective_rank": effective_rank(eigenvalues_D),
        }
        if self._writer is not None:
            self._writer.write(record)
            self._writer.spectrum(step, eigenvalues_D)
        shown = {
            "images/s": f"{images_per_s:,.0f}",
            "loss": f"{values['loss']:.3f}",
            "top-1": f"{values['probe_top1']:.3f}",
            "data wait": f"{data_wait:.0%}",
        }
        self.progress.advance(step, shown)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Writes and shows an evaluation."""
        self.totals.val_top1, self.totals.knn_top1 = result.val_top1, result.knn_top1
        if step == 0:
            self.totals.knn_top1_initial = result.knn_top1
        if self._writer is not None:
            self._writer.write({"step": step, "epoch": self.epoch(step), **asdict(result)})
        self.progress.say(
            f"epoch {self.epoch(step):g}: validation top-1 {result.val_top1:.3f}, "
            f"k-NN {result.knn_top1:.3f}"
        )

    def flush(self) -> Totals:
        """Brings all records to the disk; gives the totals up to now."""
        if self._writer is not None:
            self._writer.flush()
        return Totals(**(asdict(self.totals) | {"wall_s": self._wall_s()}))

    def summary(
        self, step: int, eigenvalues_D: Tensor, dropped: int, failure: str | None
    ) -> Summary:
        """Writes summary.json; a run without ``failure`` is completed and its table printed."""
        totals = self.totals
        rank = effective_rank(eigenvalues_D)
        summary: Summary = {
            "completed": failure is None,
            "failure": failure,
            "epochs": self.epoch(step),
            "steps": step,
            "val_top1": totals.val_top1,
            "knn_top1": totals.knn_top1,
            "knn_top1_initial": totals.knn_top1_initial,
            "knn_top1_pixels": totals.knn_top1_pixels,
            "effective_rank": rank if math.isfinite(rank) else None,
            "images_per_s": step * self._batch_size / totals.train_s if totals.train_s else None,
            "wall_s": self._wall_s(),
            "dropped_images_per_epoch": dropped,
        }
        self.flush()
        if self._writer is not None:
            write_json(self._run_dir / "summary.json", summary)
        self.progress.close()
        if failure is None:
            table = results_table(self._run_dir, summary, self._environment)
            self.progress.say(f"\n{self._run_dir}: completed\n\n{table}\n")
        return summary

    def epoch(self, step: int) -> float:
        """Passes over the images after ``step`` steps."""
        return round(step / self._steps_per_epoch, 4)

    def close(self) -> None:
        """Closes the files and the bar."""
        self.progress.close()
        if self._writer is not None:
            self._writer.close()

    def _wall_s(self) -> float:
        return self.totals.wall_s + time.perf_counter() - self._began
