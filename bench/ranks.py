"""Time a training step on one, two and four CPU ranks with the same global batch.

    python bench/ranks.py [--ranks 1 2 4] [--batch 64] [--width 16] [--rounds 9] [--steps 3]

The CIFAR-10 preset on a batch already in memory, in fp32, one thread per rank, over gloo. All
groups of ranks are alive at once and take steps in rotating order. Rank 0's time in collectives
includes waiting for the others; memory is its peak. With more ranks than cores, ranks also wait for
a core. Results go to bench/results/ranks-NNN.csv and .png.
"""

import argparse
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import harness
import torch
import torch.distributed as dist
from harness import Contender, Work
from step import make_state

from isofast.data import Batch
from isofast.training.parallel import init_world


def serve(asked: Connection, rank: int, ranks: int, port: int, batch: int, width: int) -> None:
    """Take each requested number of steps; reply with ms per step, ms in collectives, peak MB."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = init_world()
    settings: dict[str, dict[str, object]] = {
        "data": {"dataset": "cifar10", "root": "none"},
        "encoder": {"width": width},
        "method": {"name": "isoloss", "ema": True},
        "train": {"batch_size": batch},
    }
    state = make_state(world, settings, channels_last=True, engine=True, stacked=ranks > 1)
    share = batch // ranks
    x_NCHW = torch.randn(2 * share, 3, 32, 32).to(memory_format=torch.channels_last)
    ours = Batch(x_NCHW, torch.randint(10, (share,)))
    all_reduce = dist.all_reduce
    within_s = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal within_s
        began = time.perf_counter()
        work = all_reduce(*args, **kwargs)
        within_s += time.perf_counter() - began
        return work

    with mock.patch.object(dist, "all_reduce", timed):
        while steps := asked.recv():
            within_s, began = 0.0, time.perf_counter()
            for _ in range(steps):
                state.step(ours)
            took_s = time.perf_counter() - began
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            asked.send((1e3 * took_s / steps, 1e3 * within_s / steps, peak_mb))


class Ranks(Contender):
    """A group of ranks, one process each."""

    def __init__(self, ranks: int, batch: int, width: int) -> None:
        super().__init__(f"{ranks} rank{'s' * (ranks > 1)}", lambda: None)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe() for _ in range(ranks)]
        self.connections = [ours for ours, _ in pipes]
        self.shares: list[float] = []
        for rank, (_, theirs) in enumerate(pipes):
            arguments = (theirs, rank, ranks, port, batch, width)
            spawn.Process(target=serve, args=arguments, daemon=True).start()

    def take(self, steps: int) -> tuple[float, float, float]:
        """Take ``steps`` steps on every rank; return rank 0's reply."""
        for connection in self.connections:
            connection.send(steps)
        first, *_ = [connection.recv() for connection in self.connections]
        return first

    def stop(self) -> None:
        for connection in self.connections:
            connection.send(0)


def main() -> None:
    """Time the groups, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=64, help="over all ranks")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9, help="n")
    parser.add_argument("--steps", type=int, default=3, help="per round")
    args = parser.parse_args()
    # before any rank asks for a device
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for key, value in harness.environment().items():
        print(f"{key}: {value}")
    groups = [Ranks(ranks, args.batch, args.width) for ranks in args.ranks]
    peak_mb = dict.fromkeys(args.ranks, 0.0)
    for group in groups:
        group.take(2)
    for turn in range(args.rounds):
        for offset in range(len(groups)):
            index = (turn + offset) % len(groups)
            took_ms, within_ms, peak_mb[args.ranks[index]] = groups[index].take(args.steps)
            groups[index].times_ms.append(took_ms)
            groups[index].shares.append(within_ms / took_ms)
    for ranks, group in zip(args.ranks, groups, strict=True):
        group.stop()
        low, high = harness.spread(group.shares)
        share = f"{statistics.median(group.shares):.0%} [{low:.0%}, {high:.0%}] in collectives"
        group.note = f"{share}, {peak_mb[ranks]:,.0f} MB a rank"
    question = f"cifar10 with EMA, global batch {args.batch}, width {args.width}, fp32"
    # no floor: the networks take most of the time
    timings = harness.summarize(question, list[Contender](groups), Work(0))
    print(harness.table(timings))
    print(*harness.write("ranks", timings), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
