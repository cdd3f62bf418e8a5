"""Collectives that isofast runs itself: means and gathers over the ranks."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def under_srun() -> bool:
    """Whether srun started this process beside others; not so for what a batch script starts."""
    return "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def launched_rank() -> int:
    """The rank that a launcher gave this process, 0 without one."""
    return int(os.environ.get("SLURM_PROCID" if under_srun() else "RANK", "0"))


def launched_world_size() -> int:
    """How many processes a launcher started, 1 without one."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS" if under_srun() else "WORLD_SIZE", "1"))


def cores_of_rank(world: World) -> int:
    """How many cores a process may use, shared with its neighbours where a launcher did not."""
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        sharing = 1
    else:
        known = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
        sharing = int(known or world.size)
    return max(1, len(os.sched_getaffinity(0)) // sharing)


def mean_over_ranks_(tensor: Tensor) -> Tensor:
    """Replaces ``tensor`` on every rank by its mean over the ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())
    return tensor


def mean_of_statistics_over_ranks_(module: nn.Module) -> None:
    """Gives every rank the mean of BatchNorm's running statistics, in one collective.

    DeepSpeed reduces gradients only; local statistics would drift apart.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _NormBase)]
    buffers = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
    flat = mean_over_ranks_(torch.cat([buffer.flatten() for buffer in buffers]))
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, mean in zip(buffers, torch.split_with_sizes(flat, sizes), strict=True):
        buffer.copy_(mean.view_as(buffer))


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the (N_rank, ...) tensors of all ranks, in the order of ranks, on each."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in _ranks()]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in _ranks()]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def gather_objects(item: object) -> list[object]:
    """``item`` of every rank, in the order of ranks."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [item]
    items: list[object] = [None for _ in _ranks()]
    dist.all_gather_object(items, item)
    return items


def world_size() -> int:
    """Processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _ranks() -> range:
    return range(dist.get_world_size())
