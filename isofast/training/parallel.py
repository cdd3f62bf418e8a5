"""The only file that imports DeepSpeed: process groups and the data-parallel engine at stage 0."""

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from isofast.config.schema import Config
from isofast.distributed import World, cores_of_rank, launched_rank, launched_world_size, under_srun
from isofast.errors import RankError, UserError

# keys that the pass-through section may not set, and what sets them
_DERIVED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size (one batch a step)",
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


def check_pass_through(config: Config) -> None:
    """Refuse DeepSpeed settings that isofast derives, and ZeRO stages.

    Raises:
        UserError: a key is derived, or a ZeRO stage above 0 is asked for.
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
    # DeepSpeed 0.19.8, stage 1, tried: it flattens gradients by view(-1), which those of
    # channels_last weights refuse. With contiguous ones losses are bitwise those of stage 0 until
    # the run is resumed: each rank has its shard of the optimizer's state and of an fp32 copy of
    # the weights, and a checkpoint has the first rank's.
    if stage != 0:
        raise UserError(
            f"deepspeed.zero_optimization.stage must be 0, got {stage!r}: higher stages cut apart "
            f"the layers that LARS adapts to and a checkpoint holds, and a ResNet fits any GPU"
        )


def init_world() -> World:
    """Join the launcher's process group (deepspeed, torchrun, srun), or start one of one process.

    The backend is NCCL where there is a GPU, gloo on a CPU.

    Raises:
        UserError: the launcher started more processes than there are GPUs, or its port is taken.
    """
    srun = under_srun()
    _fill_launcher_environment()
    cuda = torch.cuda.is_available()
    local_rank = gpu = int(os.environ["LOCAL_RANK"])
    if cuda:
        if srun and torch.cuda.device_count() == 1:
            # with --gpus-per-task=1 a task sees its own alone; DeepSpeed counts by LOCAL_RANK
            gpu, os.environ["LOCAL_RANK"] = 0, "0"
        if gpu >= torch.cuda.device_count():
            raise RankError(
                f"process {local_rank} on this machine has no GPU of its own: "
                f"{torch.cuda.device_count()} visible. Start at most as many processes as GPUs"
            )
        torch.cuda.set_device(gpu)
    device = torch.device("cuda", gpu) if cuda else torch.device("cpu")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, local_rank, device)
    if size == 1 and importlib.util.find_spec("deepspeed") is None:
        # enough for a step in a CUDA graph, which takes no engine
        return world
    if not cuda and size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # ranks that each take all cores wait for each other at every barrier of OpenMP
        torch.set_num_threads(min(torch.get_num_threads(), cores_of_rank(world)))
    deepspeed = _import_deepspeed()
    if not cuda:
        # DeepSpeed would compile a shared-memory all-reduce at the first start: 40 s and a
        # compiler, for collectives that gloo does as well at this size.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} is taken, by another run on this machine most "
            f"likely; give the launcher another one, such as deepspeed --master_port 29501"
        ) from None
    return world


def close_world() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        # torch's own would leave DeepSpeed its groups, for the next run to take
        _import_deepspeed().comm.destroy_process_group()


def make_engine(module: nn.Module, optimizer: Optimizer, config: Config, world: World) -> Any:
    """DeepSpeed's engine around ``module``: call it, then ``backward(loss)`` and ``step()``.

    Gradients are averaged over the ranks after the backward, in fp32; rank 0's parameters are
    given to all at the start.

    Raises:
        UserError: DeepSpeed does not accept the pass-through section.
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
    # its first broadcast takes no scalars, such as a temperature that a method learns
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
            f"DeepSpeed refused its settings; the deepspeed section of the config adds "
            f"{config.deepspeed}. It said: {type(error).__name__}: {error}"
        ) from error
    for p in scalars:
        p.data = p.data.view(())
    # one rank has nothing to average, and the engine would copy every gradient twice
    engine.enable_backward_allreduce = world.size > 1
    return engine


def restore_engine(engine: Any, steps: int) -> None:
    """Tell the engine how many steps were taken before this process."""
    engine.global_steps = engine.micro_steps = steps
    engine.global_samples = steps * engine.train_batch_size()


def _fill_launcher_environment() -> None:
    """Slurm's variables under torch's names; one process where no launcher set anything."""
    env = os.environ
    if under_srun():
        rank, size = launched_rank(), launched_world_size()
        env.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=env["SLURM_LOCALID"])
        if "MASTER_ADDR" not in env:
            raise UserError(
                "started by srun without MASTER_ADDR; export MASTER_ADDR=$(scontrol show hostnames "
                '"$SLURM_JOB_NODELIST" | head -n 1) and MASTER_PORT before srun'
            )
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        # any free port: nobody else has to find it
        env["MASTER_PORT"] = "0"
    env.setdefault("LOCAL_RANK", "0")


def _import_deepspeed() -> Any:
    """DeepSpeed, without the banners that it and its imports print."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
