"""The training state of a run: built from its config, saved and restored as a whole."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from isofast.config.schema import Config, MethodConfig
from isofast.data import Batch, ImageFolder, Recipe, TrainLoader, recipe_for
from isofast.distributed import World, cores_of_rank, gather_objects
from isofast.errors import UserError
from isofast.methods import Method, make_method
from isofast.methods.batch_norm import convert_batch_norm
from isofast.methods.closed_form import ClosedForm
from isofast.methods.ema import EmaTarget
from isofast.methods.networks import Branch
from isofast.methods.weights import initialise
from isofast.run.checkpoint import encoder_file
from isofast.run.directory import cpu_has_bf16
from isofast.training.optim import LARS, load_optimizer_state, make_optimizer
from isofast.training.parallel import make_engine, restore_engine
from isofast.training.parts import part
from isofast.training.step import Online, StepOutput
from isofast_kernels.arguments import MAX_FEATURES
from isofast_kernels.matrix_power import runs_by_products

State = dict[str, Any]
# of checkpoints; 3 dropped BatchNorm's counters, 4 added the precision
_FORMAT = 4
# Inductor options on a GPU. With its default limits it writes out, for a second reader, what
# BatchNorm's backward can recompute from x: 6.8 GB, not 4.3, for CIFAR-10's backward at batch 256
_INDUCTOR = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200}


@dataclass
class TrainState:
    """The live objects of a run; ``online`` is the raw module inside ``engine``."""

    world: World
    online: Online
    target: EmaTarget | None
    optimizer: Optimizer
    engine: Any
    """The DeepSpeed engine; None in a single process whose step is a CUDA graph."""
    compiled: bool
    """Whether the networks are compiled with torch.compile."""
    graphed: bool
    """Whether the step is a CUDA graph."""

    @property
    def method(self) -> Method:
        """The method in ``online``."""
        return self.online.method

    def step(self, batch: Batch) -> StepOutput:
        """Take one training step, with the current learning rates and EMA decay."""
        with part("target"):
            targets = None if self.target is None else self.target(batch)
        if self.engine is None:
            output: StepOutput = self.online(batch, targets)
            with part("backward"):
                torch.autograd.backward(output.loss + output.probe.loss)
            with part("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
        else:
            output = self.engine(batch, targets)
            with part("backward"):
                self.engine.backward(output.loss + output.probe.loss)
            with part("optimizer"):
                self.engine.step()
        if self.target is not None:
            with part("target's move"):
                self.target.move_(self.online.branch)
        return output

    def initialise(self, path: str | None) -> list[str]:
        """Load the encoder of a file or run, for the target too; return a line describing it."""
        if path is None:
            return []
        note = initialise(self.online.branch.encoder, encoder_file(Path(path)))
        if self.target is not None:
            self.target.branch.load_state_dict(self.online.branch.state_dict())
        return [note]

    def capture(self) -> State:
        """Return all that training changes, as tensors and plain values. Call on every rank."""
        return {
            "format": _FORMAT,
            "online": self.online.state_dict(),
            "target": None if self.target is None else self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": gather_objects(_rng_state(self.world.device)),
            "world_size": self.world.size,
            "device": self.world.device.type,
            "threads": torch.get_num_threads(),
            "precision": str(self.online.branch.precision).removeprefix("torch."),
        }

    def restore(self, state: State, steps: int) -> list[str]:
        """Restore a state from ``capture``, taken ``steps`` steps into the run.

        Returns:
            One line for each reason why the run will not continue bitwise identically.

        Raises:
            UserError: the state is of other networks.
        """
        try:
            self.online.load_state_dict(state["online"])
        except RuntimeError as error:
            first = str(error).partition("\n\t")[2].partition("\n")[0]
            raise UserError(
                f"the run's checkpoints are of other networks ({first}): the code of encoder.name "
                f"or method.name, or its library, has changed. Restore it, or start over with "
                f"--fresh"
            ) from error
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.engine is not None:
            restore_engine(self.engine, steps)
        # "auto" keeps its meaning on another machine
        for module in (self.online, self.target):
            if module is not None:
                module.branch.precision = getattr(torch, state["precision"])
        notes = []
        before, now = state["device"], self.world.device.type
        if before != now:
            notes.append(f"the run was on a {before} and is on a {now} now: rounding differs")
        ranks = state["world_size"]
        if ranks != self.world.size:
            notes.append(
                f"the run had {ranks} process(es) and has {self.world.size} now: the batches are "
                f"the same, but summed in another order; BatchNorm statistics differ if local"
            )
        if notes:
            # isofast never uses these generators; dropout in a custom encoder may
            torch.manual_seed(steps * self.world.size + self.world.rank)
        else:
            _set_rng_state(state["rng"][self.world.rank], self.world.device)
        threads = state.get("threads", torch.get_num_threads())
        if now == "cpu" and threads != torch.get_num_threads():
            notes.append(
                f"the run had {threads} thread(s) per process and has {torch.get_num_threads()} "
                f"now (OMP_NUM_THREADS): rounding differs"
            )
        return notes

    def is_finite(self) -> bool:
        """Return whether every parameter is finite. Synchronises with the GPU."""
        norms = torch._foreach_norm([p.detach() for p in self.online.parameters()])
        return bool(torch.isfinite(torch.stack(norms)).all())


def check_version(state: State) -> None:
    """Refuse a captured state of another version of isofast.

    Raises:
        UserError: it is from another version.
    """
    if state.get("format") != _FORMAT:
        raise UserError(
            "the run's checkpoints are from another version of isofast; finish it with that "
            "version, or start over with --fresh"
        )


def build(config: Config, world: World, classes: int, *, uneven_labels: bool = False) -> TrainState:
    """Build a new run's networks, target, C, optimizer and engine, seeded by ``config.seed``.

    Args:
        config: the run's configuration.
        world: this process among its peers.
        classes: number of outputs of the probe.
        uneven_labels: as in Online.

    Raises:
        UserError: the embeddings are wider than the kernels support.
    """
    torch.manual_seed(config.seed)
    cuda = world.device.type == "cuda"
    if cuda and config.projector.output > MAX_FEATURES:
        raise UserError(
            f"projector.output is {config.projector.output}; on a GPU the losses support at most "
            f"{MAX_FEATURES}. Set projector.output to that or less (the paper uses 256)"
        )
    torch.backends.cudnn.benchmark = cuda
    side = recipe_for(config.data.dataset, crop=config.data.crop).crop
    synchronised = synchronises_batch_norm(config, world)
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and cuda)
    fused = compiled and cuda
    branch = Branch(
        config.encoder,
        config.projector,
        _precision(config, cuda),
        side,
        stacked=world.device.type != "cpu" or synchronised,
        synchronised=synchronised,
        fused=fused,
        pieces=config.train.accumulation,
    )
    probe = nn.Linear(branch.features_out, classes)
    method = make_method(config.method, config.projector)
    convert_batch_norm(method, views=1, synchronised=synchronised, fused=fused)
    online = Online(branch, probe, method, uneven_labels=uneven_labels)
    online.to(world.device)
    target = EmaTarget(online.branch, config.method.ema_base) if config.method.ema else None
    if compiled:
        # all networks in a process share code objects; torch would keep only eight builds of each
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        options = _INDUCTOR if cuda else None
        # in place, so that parameters keep their names
        online.branch.compile(options=options)
        for part in online.method.children():
            if any(True for _ in part.parameters()):
                part.compile(options=options)
        if target is not None:
            target.branch.compile(options=options)
    optimizer = make_optimizer(online, config)
    graphed = is_graphed(config, world)
    # outside a graph, guards on 400 tensors would be checked on the host in every step
    if fused and graphed:
        # stack up to 64 norms without copying each one first
        one_pass = partial(torch.compile, dynamic=False, options={"max_pointwise_cat_inputs": 64})
        if isinstance(optimizer, LARS):
            optimizer.update = one_pass(optimizer.update)  # type: ignore[method-assign]
        if target is not None:
            target.lerp_ = one_pass(target.lerp_)
    engine = None if graphed else make_engine(online, optimizer, config, world)
    # only now: DeepSpeed's initial broadcast rejects non-contiguous parameters
    for module in (online, target):
        if module is not None:
            module.to(memory_format=torch.channels_last)
    return TrainState(world, online, target, optimizer, engine, compiled, graphed)


def train_loader(
    config: Config,
    world: World,
    train: ImageFolder,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    start_step: int = 0,
) -> TrainLoader:
    """Return this rank's loader, starting at ``start_step``."""
    return TrainLoader(
        config.data.backend,
        train,
        recipe,
        batch_size=config.batch_size_per_rank(world.size),
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        device=world.device,
        start_step=start_step,
        threads=config.data.threads or cores_of_rank(world),
        prefetch=config.data.prefetch,
        resident_limit_gb=config.data.resident_limit_gb,
        dtype=dtype,
    )


def synchronises_batch_norm(config: Config, world: World) -> bool:
    """Return whether BatchNorm statistics are computed over all ranks."""
    return world.size > 1 and config.train.batch_norm != "local"


def is_graphed(config: Config, world: World) -> bool:
    """Return whether the step is a CUDA graph.

    Raises:
        UserError: ``cuda_graph`` is "on" with several processes or micro-batches.
    """
    pieces = config.train.accumulation
    if config.train.cuda_graph == "on" and (world.size > 1 or pieces > 1):
        raise UserError(
            f"train.cuda_graph=on needs one process and train.accumulation=1, got {world.size} "
            f"process(es) and train.accumulation={pieces}; leave it at auto"
        )
    # a graph freezes Python values at capture; only our own code is known not to depend on any
    encoder = config.encoder.name
    ours = ":" not in config.method.name and (":" not in encoder or encoder.startswith("timm:"))
    auto = world.device.type == "cuda" and world.size == pieces == 1 and ours
    auto = auto and not _decomposes(config.method)
    return config.train.cuda_graph == "on" or (config.train.cuda_graph == "auto" and auto)


def _decomposes(method: MethodConfig) -> bool:
    """Return whether W needs an eigendecomposition, which synchronises with the host."""
    if not isinstance(method, ClosedForm.Config) or method.alpha == 1:
        return False
    return not runs_by_products(method.alpha, method.eps, method.normalize)


def has_bf16(cuda: bool) -> bool:
    """Whether bf16 is native; cards before Ampere emulate it, and Inductor does not compile it."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_has_bf16()


def _precision(config: Config, cuda: bool) -> torch.dtype:
    asked = config.train.precision
    bf16 = asked == "bf16" or (asked == "auto" and has_bf16(cuda))
    return torch.bfloat16 if bf16 else torch.float32


def _rng_state(device: torch.device) -> State:
    """Return torch's generator states; a run never uses NumPy's or Python's global ones."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_rng_state(state: State, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
