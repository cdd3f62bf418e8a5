"""fit(): a run from its config to its summary; the loop reads from top to bottom."""

import atexit
import gc
import sys
import threading
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import NoReturn

import torch

from isofast.config.schema import Config
from isofast.data import ImageFolder, Recipe, recipe_for
from isofast.data.folder import UNLABELLED
from isofast.data.images import (
    Images,
    agree_on_images,
    data_set_notes,
    describe_images,
    list_images,
)
from isofast.data.preview import write_views
from isofast.distributed import (
    World,
    gather_objects,
    launched_rank,
    launched_world_size,
    mean_of_statistics_over_ranks_,
    mean_over_ranks_,
)
from isofast.errors import RunError, UserError
from isofast.methods.weights import describe
from isofast.run.checkpoint import newest_checkpoint
from isofast.run.collapse import Finding, remedies
from isofast.run.directory import describe_environment, open_run_dir
from isofast.run.recorder import Recorder, Totals
from isofast.run.saving import Saver
from isofast.run.summary import Summary
from isofast.training.build import (
    TrainState,
    build,
    check_version,
    synchronises_batch_norm,
    train_loader,
)
from isofast.training.faults import in_words
from isofast.training.graph import GraphedStep
from isofast.training.heartbeat import Heartbeat
from isofast.training.online import Evaluator
from isofast.training.optim import set_lr
from isofast.training.parallel import (
    check_pass_through,
    check_same_config,
    close_world,
    init_world,
    launcher_environment,
    patient_group,
)
from isofast.training.signals import Signals, stopped
from isofast.training.stall import StallWatch
from isofast.training.step import StepOutput, embedding_scalars

_TRAINING = threading.Lock()


def fit(config: Config, run_dir: str | PathLike[str]) -> Summary:
    """Train ``config`` in ``run_dir``, or resume from its newest intact checkpoint.

    Call it in every process that the launcher starts, or in a single process.

    Returns:
        The contents of summary.json.

    Raises:
        UserError: the configuration, the data or the run dir does not allow the run.
        RunError: the run cannot continue; the run dir says what is known.
        Stopped: a signal ended the run, which can continue; not an Exception, so that it ends a
            loop over runs too.
    """
    if not _TRAINING.acquire(blocking=False):
        raise UserError("another thread is training; start runs side by side as processes")
    try:
        summary = _fit(config, Path(run_dir))
    finally:
        _TRAINING.release()
    # the engine and the pipelines refer to themselves, and hold threads, files and memory. Not
    # after an error: a launcher may leave this process a second to say it
    gc.collect()
    return summary


def _fit(config: Config, run_dir: Path) -> Summary:
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        # within it, the networks' own autocast would keep its copies of old weights
        raise UserError("call fit outside torch.autocast; train.precision sets the precision")
    check_pass_through(config)
    config.batch_size_per_rank(launched_world_size())
    data = config.data
    recipe = recipe_for(data.dataset, crop=data.crop, augmentation=data.augmentation)
    images = list_images(config)
    # gradients, fp32 and CPU tensors by default, whatever the caller has set
    with torch.inference_mode(False), in_words(config), ExitStack() as last, ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(launcher_environment())
        if launched_rank() == 0:
            stack.enter_context(open_run_dir(run_dir, config))
        joins = not torch.distributed.is_initialized()
        if joins and launched_world_size() == 1:
            # torch prefixes tracebacks with the rank from here on
            stack.callback(setattr, sys, "excepthook", sys.excepthook)
        world = init_world()
        if joins:
            # several ranks could not rendezvous again on the launcher's port for a next run
            (stack.callback if world.size == 1 else atexit.register)(close_world)
        watched = stack.enter_context(ExitStack())
        told = threading.Event()
        watched.enter_context(Heartbeat(world, told))
        group = patient_group(world)
        signals = Signals(told, group)
        # released last: when a rank dies the launcher signals the others, which first say why
        last.push(signals.__exit__)
        check_same_config(config)
        images = agree_on_images(config, world, images, group)
        watch = stack.enter_context(StallWatch(data, world.rank))
        run = _Run(config, run_dir, world, recipe, images, watch, stack)
        signals.hold(watch)
        watched.callback(signals.done)
        try:
            # once it ends, ranks close their files at their own pace
            with in_words(config), watched:
                run.train(signals)
        except Exception as error:
            if signals.received and not isinstance(error, UserError | RunError):
                # a signal to the whole process group also ends a compiler that the step waits for
                raise stopped(signals.received, run.step, world, error) from error
            run.finish(failure=str(error) or type(error).__name__)
            raise
        return run.finish()


class _Run:
    """One process's part of a run; ``stack`` closes what it opens."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        world: World,
        recipe: Recipe,
        images: Images,
        watch: StallWatch,
        stack: ExitStack,
    ) -> None:
        self.config, self.run_dir, self.world, self.recipe = config, run_dir, world, recipe
        train, val = images
        self.synchronised = synchronises_batch_norm(config, world)
        # without classes the probe has one output and nothing to learn
        outputs = max(1, len(train.classes))
        self.labelled = bool(train.classes)
        uneven = self.labelled and world.size > 1 and bool((train.labels == UNLABELLED).any())
        self.state: TrainState = build(config, world, outputs, uneven_labels=uneven)
        self.fingerprints = {
            "training": train.fingerprint,
            "validation": None if val is None else val.fingerprint,
        }
        self.step, totals, notes, backend_before = self._resume()

        self.loader = train_loader(
            config,
            world,
            train,
            recipe,
            dtype=self.state.online.branch.precision,
            start_step=self.step,
        )
        stack.callback(self.loader.close)
        if backend_before not in (None, self.loader.backend):
            raise UserError(
                f"the run started with the {backend_before} backend, and {self.loader.backend} "
                f"jitters colours slightly differently; continue with "
                f"--set data.backend={backend_before}, or start over with --fresh"
            )
        self.batches = watch.over(self.loader)
        self.steps_per_epoch: int = self.loader.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)
        self.evaluator = (
            None
            if val is None
            else Evaluator(config, train, val, recipe, world, watch, backend=self.loader.backend)
        )
        precision = str(self.state.online.branch.precision).removeprefix("torch.")
        switches = {"compile": self.state.compiled, "cuda_graph": self.state.graphed}
        resolved = {name: "on" if on else "off" for name, on in switches.items()}
        resolved |= {"backend": self.loader.backend, "precision": precision}
        statistics = "synchronised" if self.synchronised else "local"
        environment = describe_environment(world, batch_norm=statistics, **resolved)
        environment["val_images"] = None if val is None else len(val)
        self.recorder = Recorder(
            run_dir,
            config,
            world,
            environment,
            totals,
            step=self.step,
            last_step=self.last_step,
            steps_per_epoch=self.steps_per_epoch,
        )
        stack.callback(self.recorder.close)
        notes += images.notes(recipe) + data_set_notes(config)
        notes += self._plan(train, environment["device"])
        self.recorder.progress.say("\n".join(notes))
        about = describe(config.encoder, recipe)
        self.saver = Saver(
            run_dir / "checkpoints", config.checkpoint, self.recorder.progress.say, about
        )
        stack.callback(self.saver.close)
        self.all_finite = torch.ones((), dtype=torch.bool, device=world.device)
        self.warned: set[str] = set()

    def train(self, signals: Signals) -> None:
        """The loop."""
        config, state, recorder = self.config, self.state, self.recorder
        take_step = GraphedStep(state.step, self.world.device) if state.graphed else state.step
        compiling = state.compiled
        local_statistics = self.world.size > 1 and not self.synchronised
        state.online.train()
        if self.step == 0 and config.evaluation.at_start:
            self.evaluate()
        recorder.resume_clock()
        while self.step < self.last_step:
            began = time.perf_counter()
            batch = next(self.batches)
            waited_s = time.perf_counter() - began
            if self.step == 0 and self.world.is_main:
                write_views(batch, self.recipe, self.run_dir / "views.png")
            lr = set_lr(state.optimizer, self.step, self.steps_per_epoch, config)
            progress = self.step / self.total_steps
            if state.target is not None:
                state.target.set_decay(progress)
            # the first step compiles silently
            with recorder.progress.waiting("compiling") if compiling else nullcontext():
                output = take_step(batch)
            compiling = False
            state.method.after_step(progress)
            if local_statistics:
                mean_of_statistics_over_ranks_(state.online)
            self.all_finite &= torch.isfinite(output.loss.detach())
            self.step += 1
            recorder.stepped(waited_s)

            at_end = self.step == self.last_step
            record_is_due = at_end or self.step % config.logging.every_steps == 0
            if record_is_due or self._spectrum_is_due():
                corr_DD = state.method.correlation.corr_DD
                recorder.spectrum(self.step, corr_DD, state.method.matrix())
            if record_is_due:
                self.log(output, lr)
            else:
                recorder.progress.advance(self.step)
            best = (at_end or self._evaluation_is_due()) and self.evaluate()
            save, stop = signals.poll(save=self.world.is_main and self.saver.is_due())
            due = self.step % config.checkpoint.every_steps == 0
            if at_end or best or save or due:
                self.checkpoint(last=at_end or stop is not None)
            if stop and not at_end:
                signals.done()
                raise stopped(stop, self.step, self.world)
        signals.done()
        if config.evaluation.knn_pixels and self.evaluator is not None:
            recorder.totals.knn_top1_pixels = self.evaluator.pixels()

    def log(self, output: StepOutput, lr: float) -> None:
        """Record this step; the only place where the loop waits for the GPU."""
        # about the previous record, to avoid a wait; other ranks receive it with the metrics
        finding = self.recorder.finding()
        scalars = {
            **self.state.method.scalars(),
            "loss": output.loss.detach(),
            "probe_loss": output.probe.loss.detach(),
            "probe_top1": output.probe.top1,
            **embedding_scalars(output.z1_BD),
            "finite": self.all_finite.float(),
            "collapsed": torch.full_like(output.probe.top1, float(finding is not None)),
        }
        means = mean_over_ranks_(torch.stack([*scalars.values()]).float()).tolist()
        values: dict[str, float] = dict(zip(scalars, means, strict=True))
        finite, collapsed = values.pop("finite"), values.pop("collapsed")
        unknown = {} if self.labelled else dict.fromkeys(("probe_loss", "probe_top1"))
        record = {"alignment": None, **values, **unknown, "lr": lr}
        self.recorder.training(self.step, record)
        if finite < 1:
            self._blow_up("the loss")
        if collapsed > 0:
            self._tell_collapse(finding)

    def evaluate(self) -> bool:
        """Evaluate on the validation set, if there is one, outside the training clock.

        Returns:
            Whether the k-NN accuracy is the best so far.
        """
        if self.evaluator is None:
            return False
        self.recorder.stop_clock()
        self.recorder.progress.note(f"evaluating on {self.evaluator.images:,} images")
        best = self.recorder.evaluation(self.step, self.evaluator(self.state.online))
        self.recorder.resume_clock()
        # rounding may differ between ranks
        return gather_objects(best)[0]

    def checkpoint(self, *, last: bool) -> None:
        """Save a checkpoint, unless a parameter is NaN or infinite; ``last`` waits for the disk."""
        self.recorder.stop_clock()
        if not self.state.is_finite():
            self._blow_up("a parameter")
        state = self.state.capture()
        if self.world.is_main:
            totals, records = self.recorder.flush()
            state["totals"] = asdict(totals)
            state["loader"] = {"backend": self.loader.backend}
            state["images"] = self.fingerprints
            encoder = self.state.online.branch.encoder.state_dict()
            self.saver.save(self.step, state, encoder, totals.best_step, records)
            if last:
                self.saver.wait()
        if last:
            gather_objects(None)
        self.recorder.resume_clock()

    def finish(self, failure: str | None = None) -> Summary:
        """Write the summary; ``failure`` says why the run could not continue."""
        corr_DD = self.state.method.correlation.corr_DD
        return self.recorder.summary(self.step, corr_DD, self.loader.dropped_per_epoch, failure)

    def _resume(self) -> tuple[int, Totals, list[str], str | None]:
        """Restore the newest intact checkpoint; return its step, totals, notes and backend."""
        notes: list[str] = []
        found = newest_checkpoint(self.run_dir / "checkpoints", notes.append)
        steps = {*gather_objects(0 if found is None else found.step)}
        if len(steps) > 1:
            raise UserError(
                f"the processes find different checkpoints in {self.run_dir}, from steps "
                f"{', '.join(map(str, sorted(steps)))}; it must be one folder on a disk that all "
                f"machines share"
            )
        if found is None:
            if (self.run_dir / "metrics.jsonl").exists():
                notes.append(f"no checkpoint in {self.run_dir} yet: starting again at step 0")
            notes += self.state.initialise(self.config.encoder.init)
            return 0, Totals(), notes, None
        state = found.load()
        check_version(state)
        for kind, fingerprint in self.fingerprints.items():
            # a run may start or resume without evaluation, and so without validation images
            if None not in (fingerprint, state["images"][kind]) and (
                fingerprint != state["images"][kind]
            ):
                raise UserError(
                    f"the {kind} images under {self.config.data.root} are not those that the run "
                    f"started with (names, classes or file sizes differ); put them back, or start "
                    f"over with --fresh"
                )
        notes += [f"continuing from {found.path}", *self.state.restore(state, found.step)]
        return found.step, Totals(**state["totals"]), notes, state["loader"].get("backend")

    def _plan(self, train: ImageFolder, device: str) -> list[str]:
        """Return lines that describe what the run is about to do."""
        config, world = self.config, self.world
        statistics = "synchronised" if self.synchronised else "of one process"
        settings = config.method.model_dump(exclude={"name"})
        method = ", ".join(f"{key} {value}" for key, value in settings.items())
        lines = [
            f"{config.method.name} ({method}), {config.optimizer.name} {config.optimizer.lr:g}, on "
            f"{describe_images(train)}, {device}",
            f"{world.size} process(es), BatchNorm statistics {statistics}, "
            f"{self.steps_per_epoch} steps per epoch "
            f"({self.loader.dropped_per_epoch} images left out of each)",
            self.loader.describe(),
            f"steps {self.step} to {self.last_step}, written to {self.run_dir}"
            if self.step < self.last_step
            else f"{self.run_dir} is at step {self.step} and has nothing left to do",
        ]
        if (config.train.max_steps or 0) > self.total_steps:
            lines.append(f"train.max_steps is beyond the end, {config.train.epochs} epochs")
        if self.state.compiled and self.step < self.last_step:
            lines.append("the first step compiles the networks, which takes a minute or two")
        return lines

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluation.every_epochs
        return every > 0 and self.step % (every * self.steps_per_epoch) == 0

    def _spectrum_is_due(self) -> bool:
        """Return whether C's eigenvalues are due, even at a step without a record."""
        every = self.config.logging.spectrum_every_steps
        return self.step % self.steps_per_epoch == 0 or bool(every and self.step % every == 0)

    def _blow_up(self, what: str) -> NoReturn:
        message = (
            f"{what} became NaN or infinite before step {self.step}; start over with "
            f"{' or '.join(remedies(self.config, 'blow-up'))}"
        )
        self.recorder.note_collapse(message)
        raise RunError(message)

    def _tell_collapse(self, finding: Finding | None) -> None:
        """Warn once per kind of collapse, or stop; only rank 0 knows which kind."""
        message = finding.message if finding else "the first process reports a collapse"
        if self.config.train.on_collapse == "stop":
            self.recorder.note_collapse(message)
            raise RunError(message)
        if finding is not None and finding.kind not in self.warned:
            self.warned.add(finding.kind)
            self.recorder.progress.say(f"warning: {message}")
