"""Ranks of a run: rank and world size, and collectives."""

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from joblib import cpu_count
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from isofast.errors import UserError

_T = TypeVar("_T")

# rank, world size, local rank
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Open MPI's mpirun, MPICH's and Intel's mpiexec, srun, which may have started the others' daemons
_OTHER_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


def launcher_variables() -> tuple[str, str, str]:
    """Return the names of the variables with the rank, the world size and the local rank."""
    if "RANK" not in os.environ:
        for names in _OTHER_LAUNCHERS:
            # a batch script started directly counts as one process
            if set(names) <= os.environ.keys() and int(os.environ[names[1]]) > 1:
                return names
    return TORCH_VARIABLES


def launched_rank() -> int:
    """Return the rank that the launcher assigned; 0 without a launcher."""
    return int(os.environ.get(launcher_variables()[0], "0"))


def launched_local_rank() -> int:
    """Return the rank on this machine that the launcher assigned; 0 without a launcher."""
    return int(os.environ.get(launcher_variables()[2], "0"))


def launched_world_size() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher.

    Raises:
        UserError: the caller's process group has another size.
    """
    size = int(os.environ.get(launcher_variables()[1], "1"))
    if dist.is_initialized() and dist.get_world_size() != size:
        raise UserError(
            f"the process group has {dist.get_world_size()} processes, but the environment says "
            f"{size}; set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each, as "
            f"torchrun does"
        )
    return size


def cores_of_rank(world: World) -> int:
    """Return the number of cores for this rank; srun has already bound its tasks to theirs."""
    env = os.environ
    known = next((env[name] for name in _LOCAL_SIZES if name in env), world.size)
    # an srun task may be a shell or a launcher that starts the ranks
    sharing = 1 if env.get("SLURM_STEP_NUM_TASKS") == str(world.size) else int(known)
    return max(1, usable_cores() // sharing)


def usable_cores() -> int:
    """Return the number of cores that the affinity and the CPU limit of a container allow."""
    cores: int = cpu_count()
    return cores


def limit_threads(cores: int) -> None:
    """Let torch use ``cores`` threads at most, unless OMP_NUM_THREADS says how many.

    torch counts the machine's cores, whatever the share of a rank or the CPU limit of a container;
    more threads than cores wait for each other at every OpenMP barrier.
    """
    if "OMP_NUM_THREADS" not in os.environ and cores < torch.get_num_threads():
        torch.set_num_threads(cores)


def mean_over_ranks_(tensor: Tensor) -> Tensor:
    """Average ``tensor`` over the ranks, in place; return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor.div_(world_size())
    return tensor


def mean_of_statistics_over_ranks_(module: nn.Module) -> None:
    """Average BatchNorm's running statistics over the ranks, in one all-reduce.

    DeepSpeed reduces gradients only; local statistics would drift apart.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _NormBase)]
    buffers = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
    flat = mean_over_ranks_(torch.cat([buffer.flatten() for buffer in buffers]))
    means = flat.split_with_sizes([buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean.view_as(buffer))


def gather_rows(rows: Tensor) -> Tensor:
    """Return the concatenated (N_rank, ...) tensors of all ranks, in rank order."""
    if world_size() == 1:
        return rows
    return torch.cat([part.to(rows.device) for part in gather_objects(rows.cpu())])


def gather_objects(item: _T, group: Any = None) -> list[_T]:
    """Return every rank's ``item``, in rank order; ``group`` is another one of all ranks."""
    if world_size() == 1:
        return [item]
    items: list[_T] = [item] * world_size()
    dist.all_gather_object(items, item, group=group)
    return items


def world_size() -> int:
    """Return the number of processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1
