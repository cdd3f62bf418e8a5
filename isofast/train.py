"""fit(): a run from its config to its summary, the loop from top to bottom."""

import math
import os
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from isofast.checkpoint import newest_checkpoint, save_checkpoint
from isofast.config import Config, to_json
from isofast.data import (
    Batch,
    ImageFolder,
    Recipe,
    make_train_loader,
    open_dataset,
    recipe_for,
    verify_images,
)
from isofast.distributed import (
    World,
    barrier,
    mean_of_buffers_over_ranks_,
    mean_over_ranks_,
    rank_from_environment,
    world_size_from_environment,
)
from isofast.engine import check_pass_through, close_world, init_world, resolve_batch_norm
from isofast.errors import RunError, UserError
from isofast.evaluate import Evaluator
from isofast.files import write_atomically
from isofast.method import StepOutput, ema_decay_at, move_target_
from isofast.metrics import MetricsWriter, effective_rank
from isofast.optim import set_lr
from isofast.progress import Progress
from isofast.rundir import describe_environment, open_run_dir, write_json
from isofast.state import TrainState, build, compiles
from isofast.summary import Summary, results_table

# Healthy embeddings spread by 1/sqrt(D) in each dimension; under this share they have collapsed.
_COLLAPSED_SPREAD = 0.01


def fit(config: Config, run_dir: Path) -> Summary:
    """Trains ``config`` in ``run_dir``, or goes on from its newest whole checkpoint.

    Called by every process of a launcher's group, or by one alone.

    Returns:
        What is in summary.json.

    Raises:
        UserError: the configuration, the data or the run dir does not allow the run.
        RunError: the run cannot go on; what is known is in the run dir.
    """
    check_pass_through(config)
    config.batch_size_per_rank(world_size_from_environment())
    recipe = recipe_for(config.data.dataset, crop=config.data.crop)
    train = open_dataset(config.data.root, "train")
    val = open_dataset(config.data.root, "val") if config.evaluation.every_epochs else None
    with ExitStack() as stack:
        if rank_from_environment() == 0:
            stack.enter_context(open_run_dir(run_dir, config))
            train = verify_images(train)
            val = val and verify_images(val)
        world = init_world()
        stack.callback(close_world)
        run = stack.enter_context(closing(_Run(config, run_dir, world, recipe, train, val)))
        try:
            run.train()
        except RunError as error:
            run.write_summary(failure=str(error))
            raise
        return run.finish()


@dataclass
class _Totals:
    """What a run adds up over all its processes, saved with each checkpoint."""

    wall_s: float = 0.0
    train_s: float = 0.0
    val_top1: float | None = None
    knn_top1: float | None = None
    knn_top1_initial: float | None = None
    knn_top1_pixels: float | None = None


@dataclass
class _Clock:
    """Time of the steps since the last record, and how much of it was spent waiting for data."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0


class _Run:
    """The objects of one process of a run, and what is done with them."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        world: World,
        recipe: Recipe,
        train: ImageFolder,
        val: ImageFolder | None,
    ) -> None:
        self.config, self.run_dir, self.world = config, run_dir, world
        batch_norm = resolve_batch_norm(config, world)
        self.environment = describe_environment(world, batch_norm)
        self.state: TrainState = build(config, world, len(train.classes), batch_norm)
        self.totals = _Totals()
        self.fingerprint = train.fingerprint
        self.step = self._resume()
        self.began = time.perf_counter()

        threads = config.data.threads or _threads_per_rank(world)
        self.loader = make_train_loader(
            config.data.loader,
            train,
            recipe,
            batch_size=config.batch_size_per_rank(world.size),
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
            device=world.device,
            start_step=self.step,
            threads=threads,
            prefetch=config.data.prefetch,
        )
        self.steps_per_epoch: int = self.loader.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)
        self.evaluator = (
            None if val is None else Evaluator(config, train, val, recipe, world, threads)
        )
        self.progress = Progress(self.last_step, min(self.step, self.last_step), world.is_main)
        self.writer: MetricsWriter | None = None
        if world.is_main:
            self._prepare_run_dir()
            self.writer = MetricsWriter(run_dir, self.step, config.logging.tensorboard)
        self.progress.say(self._opening(train))
        self.clock = _Clock()
        self.all_finite = torch.ones((), dtype=torch.bool, device=world.device)
        self.warned = False

    def train(self) -> None:
        """The loop."""
        config, state, world = self.config, self.state, self.world
        local_statistics = world.size > 1 and self.environment["batch_norm"] == "local"
        state.online.train()
        if self.step == 0 and config.evaluation.at_start:
            self.evaluate()
        while self.step < self.last_step:
            batch = self._next_batch()
            lr = set_lr(state.optimizer, self.step, self.steps_per_epoch, config)
            output = state.method(batch)
            state.engine.backward(output.loss + output.probe.loss)
            state.engine.step()
            if state.target is not None:
                decay = ema_decay_at(self.step, self.total_steps, config.method.ema_base)
                move_target_(state.target, state.online.branch, decay)
            if local_statistics:
                mean_of_buffers_over_ranks_(state.online)
            self.all_finite &= torch.isfinite(output.loss.detach())
            self.step += 1
            self.clock.steps += 1

            at_end = self.step == self.last_step
            if at_end or self.step % config.logging.every_steps == 0:
                self.log(output, lr)
            else:
                self.progress.advance(self.step)
            if at_end or self._evaluation_is_due():
                self.evaluate()
            if at_end or self.step % config.checkpoint.every_steps == 0:
                self.checkpoint()

    def log(self, output: StepOutput, lr: float) -> None:
        """Records this step; the only place where the loop waits for the GPU."""
        values = torch.stack(
            [
                output.loss.detach(),
                output.probe.loss.detach(),
                output.probe.top1,
                output.embedding_std(),
                output.alignment(),
                self.all_finite.float(),
            ]
        )
        loss, probe_loss, probe_top1, spread, alignment, finite = mean_over_ranks_(values).tolist()
        elapsed, waited, images = self._lap()
        eigenvalues_D = self.state.correlation.eigenvalues()
        record = {
            "step": self.step,
            "epoch": self._epoch(),
            "loss": loss,
            "lr": lr,
            "probe_loss": probe_loss,
            "probe_top1": probe_top1,
            "images_per_s": images / elapsed,
            "data_wait": waited / elapsed,
            "effective_rank": effective_rank(eigenvalues_D),
            "embedding_std": spread,
            "alignment": alignment,
        }
        if self.writer is not None:
            self.writer.write(record)
            self.writer.spectrum(self.step, eigenvalues_D)
        shown = {
            "images/s": f"{images / elapsed:,.0f}",
            "loss": f"{loss:.3f}",
            "top-1": f"{probe_top1:.3f}",
            "data wait": f"{waited / elapsed:.0%}",
        }
        self.progress.advance(self.step, shown)
        if finite < 1:
            raise RunError(
                f"the loss became NaN or infinite before step {self.step}. The last checkpoint "
                f"is from before; start over with a lower optimizer.lr or a longer "
                f"schedule.warmup_epochs"
            )
        self._watch_for_collapse(spread)

    def evaluate(self) -> None:
        """Clean top-1 and k-NN, where there is a validation set; not counted as training time."""
        if self.evaluator is None:
            return
        self._lap()
        self.progress.note(f"evaluating on {self.evaluator.images:,} images")
        result = self.evaluator(self.state.online)
        self.totals.val_top1, self.totals.knn_top1 = result.val_top1, result.knn_top1
        if self.step == 0:
            self.totals.knn_top1_initial = result.knn_top1
        if self.writer is not None:
            self.writer.write({"step": self.step, "epoch": self._epoch(), **asdict(result)})
        self.progress.say(
            f"epoch {self._epoch():g}: validation top-1 {result.val_top1:.3f}, "
            f"k-NN {result.knn_top1:.3f}"
        )
        self.clock = _Clock()

    def checkpoint(self) -> None:
        """Saves everything that training has changed, if it is sound."""
        self._lap()
        if not self.state.is_finite():
            raise RunError(
                f"a parameter became NaN or infinite before step {self.step}. The last checkpoint "
                f"is from before; start over with a lower optimizer.lr"
            )
        state = self.state.capture()
        if self.writer is not None:
            # first what the checkpoint takes for granted, then the checkpoint
            self.writer.flush()
            state["loader"] = self.loader.state_dict()
            state["totals"] = asdict(self.totals) | {"wall_s": self._wall_s()}
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.step,
                state,
                self.state.online.branch.encoder,
                self.config.checkpoint.keep,
            )
        barrier()
        self.clock = _Clock()

    def finish(self) -> Summary:
        """Writes the summary and prints the table of results."""
        if self.config.evaluation.knn_pixels and self.evaluator is not None:
            self.totals.knn_top1_pixels = self.evaluator.pixels()
        summary = self.write_summary()
        self.progress.close()
        table = results_table(self.run_dir, summary, self.environment)
        self.progress.say(f"\n{self.run_dir}: completed\n\n{table}\n")
        return summary

    def write_summary(self, failure: str | None = None) -> Summary:
        """summary.json; ``failure`` says why the run could not go on."""
        totals = self.totals
        images = self.step * self.config.train.batch_size
        summary: Summary = {
            "completed": failure is None,
            "failure": failure,
            "epochs": self._epoch(),
            "steps": self.step,
            "val_top1": totals.val_top1,
            "knn_top1": totals.knn_top1,
            "knn_top1_initial": totals.knn_top1_initial,
            "knn_top1_pixels": totals.knn_top1_pixels,
            "effective_rank": effective_rank(self.state.correlation.eigenvalues()),
            "images_per_s": images / totals.train_s if totals.train_s else None,
            "wall_s": self._wall_s(),
            "dropped_images_per_epoch": self.loader.dropped_per_epoch,
        }
        if self.writer is not None:
            self.writer.flush()
            write_json(self.run_dir / "summary.json", summary)
        return summary

    def close(self) -> None:
        """Closes files and the loader."""
        self.progress.close()
        self.loader.close()
        if self.writer is not None:
            self.writer.close()

    def _resume(self) -> int:
        """Restores the newest whole checkpoint; returns its step, 0 without one."""
        notes: list[str] = []
        found = newest_checkpoint(self.run_dir / "checkpoints", notes.append)
        self.notes = notes
        if found is None:
            return 0
        state = found.load()
        if state["loader"]["fingerprint"] != self.fingerprint:
            raise UserError(
                f"the training images under {self.config.data.root} are not those that the run "
                f"began with (names or classes differ); put them back, or start over with --fresh"
            )
        self.state.restore(state, found.step)
        self.totals = _Totals(**state["totals"])
        notes.append(f"continuing from {found.path}")
        return found.step

    def _prepare_run_dir(self) -> None:
        text = to_json(self.config)
        write_atomically(
            self.run_dir / "config.json", lambda path: path.write_text(text, encoding="utf-8")
        )
        write_json(self.run_dir / "environment.json", self.environment)

    def _opening(self, train: ImageFolder) -> str:
        """What the run is about to do, in a few lines."""
        config, world = self.config, self.world
        method = config.method
        lines = [
            *self.notes,
            f"{method.name} ({method.metric}, alpha {method.alpha:g}, "
            f"{'EMA target' if method.ema else 'no EMA'}) on {len(train):,} images of "
            f"{len(train.classes)} classes, {self.environment['device']}",
            f"{world.size} process(es), BatchNorm statistics "
            + ("of one process" if world.size == 1 else self.environment["batch_norm"])
            + f", {self.steps_per_epoch} steps an epoch"
            + f" ({self.loader.dropped_per_epoch} images left out of each)",
            f"steps {self.step} to {self.last_step}, written to {self.run_dir}",
        ]
        if compiles(config, world.device.type == "cuda") and self.step < self.last_step:
            lines.append("compiling the networks; the first step takes a minute or two")
        return "\n".join(lines)

    def _next_batch(self) -> Batch:
        began = time.perf_counter()
        batch: Batch = next(self.loader)
        self.clock.waited += time.perf_counter() - began
        return batch

    def _lap(self) -> tuple[float, float, int]:
        """Seconds, seconds of waiting and images since the last lap; starts a new one."""
        clock, self.clock = self.clock, _Clock()
        elapsed = self.clock.began - clock.began
        if clock.steps:
            self.totals.train_s += elapsed
        return elapsed, clock.waited, clock.steps * self.config.train.batch_size

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluation.every_epochs
        return every > 0 and self.step % (every * self.steps_per_epoch) == 0

    def _watch_for_collapse(self, spread: float) -> None:
        healthy = 1 / math.sqrt(self.config.projector.output)
        if spread >= _COLLAPSED_SPREAD * healthy or self.warned:
            return
        message = (
            f"the embeddings have collapsed: their spread is {spread:.2g} at step {self.step}, "
            f"{healthy:.2g} is healthy. Try method.name isoloss, method.ema true or a lower "
            f"optimizer.lr"
        )
        if self.config.train.on_collapse == "stop":
            raise RunError(message)
        self.warned = True
        self.progress.say(f"warning: {message}")

    def _epoch(self) -> float:
        return round(self.step / self.steps_per_epoch, 4)

    def _wall_s(self) -> float:
        return self.totals.wall_s + time.perf_counter() - self.began


def _threads_per_rank(world: World) -> int:
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size
    return max(1, len(os.sched_getaffinity(0)) // int(local))
