"""The only file that imports DeepSpeed: process groups and the data-parallel engine at stage 0."""

import contextlib
import importlib.util
import io
import logging
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from isofast.config.schema import Config, changed_keys
from isofast.distributed import (
    TORCH_VARIABLES,
    World,
    cores_of_rank,
    gather_objects,
    launched_local_rank,
    launched_rank,
    launched_world_size,
    launcher_variables,
    limit_threads,
)
from isofast.errors import RankError, UserError, tell

# keys that the pass-through section may not set, and what sets them
_DERIVED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size (one batch per step)",
    "gradient_clipping": "the paper's recipe, which has none",
    "steps_per_print": "logging.every_steps",
    "optimizer": "optimizer.name",
    "scheduler": "schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "timers": "logging (the throughput timer synchronises every step)",
    "wall_clock_breakdown": "logging (it synchronises every step)",
}
_NEVER_PRINT = 2**62
_GLOO_DEVICE = "GLOO_SOCKET_IFNAME"
_PATIENCE_S = 10.0


def check_pass_through(config: Config) -> None:
    """Reject DeepSpeed settings that isofast derives, and ZeRO stages above 0.

    Raises:
        UserError: the section has a derived key or a ZeRO stage above 0.
    """
    for key in config.deepspeed:
        if key in _DERIVED:
            raise UserError(
                f"deepspeed.{key} is derived from {_DERIVED[key]}; remove it from the deepspeed "
                f"section"
            )
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"deepspeed.zero_optimization must be a section, got {zero!r}")
    stage = zero.get("stage", 0)
    # Tried stage 1 of DeepSpeed 0.19.8: it flattens gradients with view(-1), which fails on
    # channels_last weights. With contiguous weights the losses match stage 0 bitwise until the run
    # is resumed: each rank holds its shard of the optimizer state and of an fp32 copy of the
    # weights, but a checkpoint holds only rank 0's.
    if stage != 0:
        raise UserError(
            f"deepspeed.zero_optimization.stage must be 0, got {stage!r}: higher stages shard the "
            f"layers that LARS and checkpoints need whole, and a ResNet fits on any GPU"
        )


def check_same_config(config: Config) -> None:
    """Compare the ranks' configurations; how one loads its data and its loggers may differ.

    Raises:
        UserError: a configuration differs from rank 0's, on every rank.
    """
    first, *others = gather_objects(config)
    for rank, other in enumerate(others, 1):
        changes = changed_keys(first, other)
        changes += changed_keys(first, other.model_copy(update={"data": first.data}), free=True)
        if kept := sorted({change for change in changes if "logging.loggers" not in change}):
            raise UserError(
                f"rank {rank} has a different configuration from rank 0's: {', '.join(kept)}"
            )


def patient_group(world: World) -> Any:
    """Return a gloo group whose collectives may wait for a day, or None for a single rank.

    For ranks that wait while one checks images; a heartbeat must find those that are lost.
    """
    if world.size == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))


@contextlib.contextmanager
def launcher_environment() -> Iterator[None]:
    """Restore the variables that `init_world` sets, from which others would infer a launcher."""
    names = (*TORCH_VARIABLES, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", _GLOO_DEVICE)
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def init_world() -> World:
    """Join the process group of deepspeed, torchrun, srun or mpirun, or create one of size 1.

    The backend is NCCL on GPUs, gloo on a CPU.

    Raises:
        UserError: the launcher started more processes than there are GPUs, or its port is in use.
    """
    srun = launcher_variables()[0] == "SLURM_PROCID"
    _fill_launcher_environment()
    cuda = torch.cuda.is_available()
    local_rank = gpu = int(os.environ["LOCAL_RANK"])
    if cuda:
        if srun and torch.cuda.device_count() == 1:
            # with --gpus-per-task=1 a task sees only its own GPU; DeepSpeed indexes by LOCAL_RANK
            gpu, os.environ["LOCAL_RANK"] = 0, "0"
        if gpu >= torch.cuda.device_count():
            raise RankError(
                f"process {local_rank} on this machine has no GPU of its own: "
                f"{torch.cuda.device_count()} visible. Start at most as many processes as GPUs, "
                "and let each see all of them (CUDA_VISIBLE_DEVICES)"
            )
        torch.cuda.set_device(gpu)
    device = torch.device("cuda", gpu) if cuda else torch.device("cpu")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, local_rank, device)
    if size == 1 and importlib.util.find_spec("deepspeed") is None:
        # enough for a step in a CUDA graph, which needs no engine
        return world
    if not cuda:
        limit_threads(cores_of_rank(world))
    deepspeed = _import_deepspeed()
    if not cuda:
        # DeepSpeed would probe the compiler (in a notebook, linker errors show), then spend 40 s
        # compiling a shared-memory all-reduce that is no faster than gloo at this size
        deepspeed.ops.__compatible_ops__ = {}
    # a process may be slow, or missing; RANK and WORLD_SIZE may be left over from another run
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    waits = f"rank {rank} is waiting for all {size} processes to connect to {address}:{port}\n"
    timer = threading.Timer(_PATIENCE_S, tell, [waits])
    timer.daemon = True
    if size > 1 and local_rank == 0:
        timer.start()
    if size > 1 and _GLOO_DEVICE not in os.environ and (name := _network_device(address)):
        os.environ[_GLOO_DEVICE] = name
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {port} is taken, most likely by another run on this machine; give the launcher "
            f"another one, such as deepspeed --master_port 29501"
        ) from None
    finally:
        timer.cancel()
    return world


def close_world() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        # torch's version would leave DeepSpeed's groups for the next run to pick up
        _import_deepspeed().comm.destroy_process_group()


def make_engine(module: nn.Module, optimizer: Optimizer, config: Config, world: World) -> Any:
    """Wrap ``module`` in a DeepSpeed engine: call it, then ``backward(loss)`` and ``step()``.

    Gradients are averaged over the ranks after the backward pass, in fp32; rank 0's parameters are
    broadcast at the start.

    Raises:
        UserError: DeepSpeed rejects the pass-through section.
    """
    settings = {
        **config.deepspeed,
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size_per_rank(world.size),
        "gradient_accumulation_steps": 1,
        # DeepSpeed's own default is 1.0
        "gradient_clipping": 0.0,
        "zero_optimization": {**config.deepspeed.get("zero_optimization", {}), "stage": 0},
        "steps_per_print": _NEVER_PRINT,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
    }
    deepspeed = _import_deepspeed()
    # its initial broadcast rejects scalars, such as a method's learned temperature
    scalars = [p for p in module.parameters() if p.ndim == 0]
    for p in scalars:
        p.data = p.data.view(1)
    try:
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
    except Exception as error:
        if not config.deepspeed:
            raise
        # DeepSpeed has no error class for bad settings
        raise UserError(
            f"DeepSpeed refused its settings, to which the config's deepspeed section adds "
            f"{config.deepspeed}. It raised {type(error).__name__}: {error}"
        ) from error
    for p in scalars:
        p.data = p.data.view(())
    # a single rank has nothing to average, but the engine would copy every gradient twice
    engine.enable_backward_allreduce = world.size > 1
    return engine


def restore_engine(engine: Any, steps: int) -> None:
    """Set the engine's counters to ``steps`` completed steps."""
    engine.global_steps = engine.micro_steps = steps
    engine.global_samples = steps * engine.train_batch_size()


def _fill_launcher_environment() -> None:
    """Set torch's variables from those of srun or mpirun, or for a single process."""
    env = os.environ
    if launcher_variables() != TORCH_VARIABLES:
        known = launched_rank(), launched_world_size(), launched_local_rank()
        env.update(zip(TORCH_VARIABLES, map(str, known), strict=True))
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if "LOCAL_RANK" not in env:
        # one process on each machine, as in a Kubernetes job
        env["LOCAL_RANK"] = "0"
        env.setdefault("LOCAL_WORLD_SIZE", "1")
    joins = env["WORLD_SIZE"] != "1" and not torch.distributed.is_initialized()
    if joins and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise UserError(
            f"WORLD_SIZE or the launcher says {env['WORLD_SIZE']} processes, but MASTER_ADDR or "
            "MASTER_PORT is not set. Before launching, export MASTER_ADDR=the first machine's name "
            '(under Slurm: $(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)) and '
            "MASTER_PORT=29500; or unset RANK and WORLD_SIZE if they are left over"
        )
    # torchrun itself listens at its port
    if env["WORLD_SIZE"] == "1" and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # any free port: no other process needs to find it
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _network_device(address: str | None) -> str | None:
    """Return the network device that reaches ``address``; None if that is a loopback address.

    gloo would take that of the host's own name, which on Debian and Ubuntu is often 127.0.1.1.
    """
    with contextlib.suppress(OSError, UnicodeError):
        family, *_, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
            # sends nothing
            datagrams.connect(target)
            own = datagrams.getsockname()[0]
        if not ip_address(own).is_loopback:
            devices: dict[str, Any] = psutil.net_if_addrs()
            for name, addresses in devices.items():
                if own in (one.address for one in addresses):
                    return name
    return None


def _import_deepspeed() -> Any:
    """Import DeepSpeed without the banners that it and its imports print."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
