"""IsoLoss in training loops as users write them, on two gloo processes or on one.

In float64, so that two processes differ from one only in the order of sums.
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from isofast_kernels import IsoLoss

VIEWS, BATCH, INPUTS, DIM = 2, 16, 10, 6


class Student(nn.Module):
    """An encoder, its projector and the loss in one module, as in a LightningModule."""

    def __init__(self, projector: nn.Module, gather: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(INPUTS, 12), nn.ReLU())
        self.projector = projector
        self.criterion = IsoLoss(DIM, decay=0.5, gather_distributed=gather)

    def embed(self, x_BI):
        # chunks of rows, so that one process can compute each rank's BatchNorm statistics
        ranks = 1 if dist.is_initialized() else 2
        return torch.cat([self.projector(self.encoder(rows)) for rows in x_BI.chunk(ranks)])

    def forward(self, x1_BI, x2_BI, targets=()):
        return self.criterion(self.embed(x1_BI), self.embed(x2_BI), *targets)


def batches(steps):
    """Yield this process's share of each step's views; all rows if it is alone."""
    generator = torch.Generator().manual_seed(7)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = BATCH // ranks
    for _ in range(steps):
        shared = torch.randn(BATCH, INPUTS, generator=generator, dtype=torch.float64)
        noise = torch.randn(VIEWS, BATCH, INPUTS, generator=generator, dtype=torch.float64)
        yield (shared + 0.3 * noise)[:, rank * rows : (rank + 1) * rows]


def mean_over_ranks(losses):
    mean = torch.stack(losses).detach()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(steps, student, call, targets_of=lambda x1_BI, x2_BI: ()):
    """Train with SGD; return the losses, C, and every parameter with its last gradient."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x1, x2 in batches(steps):
        optimizer.zero_grad()
        losses.append(call(x1, x2, targets_of(x1, x2)))
        losses[-1].backward()
        optimizer.step()
    results = {"losses": mean_over_ranks(losses), "C": student.criterion.corr_DD}
    for name, parameter in student.named_parameters():
        results |= {name: whole(parameter), f"{name}.grad": whole(parameter.grad)}
    return {name: tensor.detach().clone() for name, tensor in results.items()}


def ddp(gather):
    """The loss outside DDP, as the criterion of a plain loop."""
    torch.manual_seed(0)
    student = Student(nn.Linear(12, DIM), gather).double()
    network = nn.Sequential(student.encoder, student.projector)
    network = DistributedDataParallel(network) if dist.is_initialized() else network

    def call(x1_BI, x2_BI, targets):
        return student.criterion(*network(torch.cat([x1_BI, x2_BI])).chunk(2))

    return trained(3, student, call)


def heads():
    """lightly's projection head and momentum teacher; DDP holds the loss and broadcasts C."""
    from lightly.models.modules.heads import BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    torch.manual_seed(0)
    student = Student(BYOLProjectionHead(12, 16, DIM)).double()
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    call = DistributedDataParallel(student) if dist.is_initialized() else student

    @torch.no_grad()
    def targets_of(x1_BI, x2_BI):
        update_momentum(student, teacher, m=0.9)
        return teacher.embed(x1_BI), teacher.embed(x2_BI)

    return trained(20, student, call, targets_of)


def fsdp():
    """Parameters sharded by FSDP2, one unit per layer."""
    torch.manual_seed(0)
    student = Student(nn.Linear(12, DIM)).double()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (student.encoder, student.projector, student):
            fully_shard(module, mesh=mesh)
        assert isinstance(student.projector.weight, DTensor)
    return trained(5, student, student)


def compiled():
    """The loss as one graph, its collective included."""
    torch.manual_seed(0)
    student = Student(nn.Linear(12, DIM)).double()
    # compiled before DDP adds its hooks; a single process has no gradients to average
    forward = torch.compile(student, fullgraph=True, backend="aot_eager")
    call = DistributedDataParallel(forward) if dist.is_initialized() else student
    return trained(3, student, call)


def everything():
    cases = {"gather": ddp(True), "local": ddp(False), "heads": heads(), "fsdp": fsdp()}
    return cases | {"compiled": compiled()}


def check_arguments():
    """What one rank refuses, several do too; a decay of 0 clears a lost C."""
    z_BD = torch.randn(4, DIM)
    for dim, decay, word in ((DIM, 1.5, "decay is 1.5"), (DIM + 1, 0.5, "with the same D")):
        criterion = IsoLoss(dim, decay=decay, gather_distributed=True)
        try:
            criterion(z_BD, z_BD)
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError(f"not refused: {word}")
        assert not criterion.corr_DD.any()
    criterion = IsoLoss(DIM, decay=0.0, gather_distributed=True)
    criterion.corr_DD.fill_(torch.nan)
    assert criterion(z_BD, z_BD).isfinite()


def main(folder: str) -> None:
    """Run one of two ranks; write FOLDER/RANK.pt."""
    dist.init_process_group("gloo")
    check_arguments()
    torch.save(everything(), f"{folder}/{dist.get_rank()}.pt")
    # a rank that exits early closes the other's connections
    dist.barrier()
    dist.destroy_process_group()
