"""Count the collectives of a training step and estimate their cost.

    python bench/collectives.py [--ranks 1 2 4 8 64] [--gloo 2 4] [--step-ms 10]

Each preset takes one step, with both views in one call, in a single process that acts
as one of n ranks through torch's fake process group. torch's profiler counts the collectives, named
after the part of the step that they are in. Each is modelled as a latency plus the bytes that a
rank sends in a ring, 2 (n - 1) / n of the message, over a bandwidth, without overlap with the rest
of the step, which takes --step-ms. gloo's latency and bandwidth are measured here, those of NVLink
and InfiniBand are published (`link_of`). Results go to bench/results/collectives-NNN.csv.
"""

import argparse
import itertools
import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing
from step import CLASSES, make_state
from torch.profiler import profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from isofast.data import Batch, recipe_for
from isofast.training.parallel import init_world
from isofast.training.parts import timed_parts
from isofast.training.signals import Signals

PRESETS = ["cifar10", "cifar10 with EMA", "tinyimagenet", "tinyimagenet with EMA"]
KNOWN = [f"{dataset}{ema}" for dataset in CLASSES for ema in ("", " with EMA")]
# over gloo, overlapped with the next step, so that no step waits for it
EXCHANGE = "stop and save"
# keyed by the part of the step and whether BatchNorm issues it
KINDS = {
    ("forward", True): "BatchNorm, forward",
    ("backward", True): "BatchNorm, backward",
    ("target", True): "BatchNorm, target",
    ("correlation", False): "C's moment",
    ("backward", False): "gradients",
    ("", False): EXCHANGE,
}
_PARTS = {part for part, _ in KINDS}
_BYTES = "bytes: "
_UNITS = {"MB": 1e6, "kB": 1e3, "B": 1}
GPUS_A_NODE = 8


class Sent(NamedTuple):
    """The number of collectives of one kind in a step, and their total message size."""

    calls: int
    bytes: int


class Link(NamedTuple):
    """An interconnect between ranks."""

    name: str
    latency_us: float
    gb_per_s: float


class Step(NamedTuple):
    """A preset's step on one of ``ranks`` ranks, and its collectives by kind."""

    preset: str
    ranks: int
    sent: dict[str, Sent]

    def ring_bytes(self, kind: str) -> float:
        """Return the bytes that a rank sends."""
        return 2 * (self.ranks - 1) / self.ranks * self.sent[kind].bytes

    def ms(self, kind: str, link: Link) -> float:
        """Return how long the step waits for this kind."""
        waits = kind != EXCHANGE
        latency_ms = self.sent[kind].calls * link.latency_us / 1e3
        return waits * (latency_ms + self.ring_bytes(kind) / link.gb_per_s / 1e6)

    def total_ms(self, link: Link) -> float:
        """Return how long the step waits for all of them."""
        return sum(self.ms(kind, link) for kind in self.sent)


def link_of(ranks: int) -> Link:
    """Return published numbers for H100s, eight per node.

    Latency: NCCL's own model of a small tree all-reduce with protocol LL (src/graph/tuning.cc at
    b647562): 6.8 us, plus twice 0.6 us per other GPU in a node, plus twice 5 us per doubling of the
    nodes. Bandwidth, reached by long messages: NVLink 4 moves 450 GB/s one way (NVIDIA's data
    sheet), each of a node's eight NDR adapters 46 to 48 (NVIDIA/nccl-tests, issue 290).
    """
    nodes = -(-ranks // GPUS_A_NODE)
    neighbours = min(ranks, GPUS_A_NODE) - 1
    latency_us = 6.8 + 2 * (0.6 * neighbours + 5 * (nodes - 1).bit_length())
    if nodes == 1:
        return Link("NVLink", latency_us, 450)
    return Link("NVLink, NDR", latency_us, 47 * GPUS_A_NODE)


def count(preset: str, ranks: int, width: int) -> Step:
    """Count the collectives of one step; call once per process."""
    dataset, *ema = preset.split(" with ")
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    world = init_world()
    settings: dict[str, dict[str, object]] = {
        "data": {"dataset": dataset, "root": "none"},
        "encoder": {"width": width},
        "method": {"name": "isoloss", "ema": bool(ema)},
        "train": {"batch_size": 2 * ranks},
    }
    state = make_state(world, settings, stacked=True, engine=True)
    side = recipe_for(dataset).crop
    batch = Batch(torch.randn(4, 3, side, side), torch.zeros(2, dtype=torch.long))
    all_reduce = dist.all_reduce

    def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"{_BYTES}{tensor.nbytes}"):
            return all_reduce(tensor, *args, **kwargs)

    signals = Signals(threading.Event(), dist.new_group(backend="fake"))
    with mock.patch.object(dist, "all_reduce", noted), timed_parts(), profile() as trace:
        state.step(batch)
        signals.poll()
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for event in trace.events():
        if event.name.startswith("c10d::"):
            within = _ancestors(event)
            part = next((name for name in within if name in _PARTS), "")
            kind = KINDS[part, "isofast::mean_over_ranks" in within]
            calls[kind] += 1
            # only all-reduces have one: any other collective fails here
            (note,) = (name for name in within if name.startswith(_BYTES))
            size[kind] += int(note.removeprefix(_BYTES))
    return Step(preset, ranks, {kind: Sent(calls[kind], size[kind]) for kind in calls})


def _ancestors(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def count_all(presets: list[str], ranks: list[int], width: int = 64) -> list[Step]:
    """Count every preset's step on every number of ranks, each in its own process."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["isofast.training.loop", "deepspeed"])
    # for the fork server: no GPU is needed, and the profiler complains without one
    quiet = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "KINETO_LOG_LEVEL": "99"}
    asked = itertools.product(presets, ranks, [width])
    with mock.patch.dict(os.environ, quiet), processes.Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(count, asked, chunksize=1)


def gloo(ranks: int, size: int) -> Link:
    """Measure gloo between local processes: latency at 1 kB, bandwidth at ``size`` bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_gloo_rank, (ranks, port, size, found), nprocs=ranks)
    latency_s, long_s = found.get()
    sent = 2 * (ranks - 1) / ranks * size
    return Link("gloo, here", latency_s * 1e6, sent / (long_s - latency_s) / 1e9)


def _gloo_rank(rank: int, ranks: int, port: int, size: int, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    medians = [_median_s(torch.zeros(256), 300), _median_s(torch.zeros(size // 4), 9)]
    if rank == 0:
        found.put(medians)
    dist.destroy_process_group()


def _median_s(tensor: torch.Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def kinds_table(steps: list[Step]) -> str:
    """Return calls and bytes by kind, one column per step."""
    lines = _head(f"collectives of a step, {steps[0].ranks} ranks", *(s.preset for s in steps))
    for kind in KINDS.values():
        sent = [step.sent.get(kind) for step in steps]
        lines.append(_row(kind, *(f"{s.calls}, {_size(s.bytes)}" if s else "" for s in sent)))
    return "\n".join(lines)


def cost_table(steps: list[Step], links: dict[int, Link], step_ms: float) -> str:
    """Return how long a step waits, one row per number of ranks and one column per preset.

    A ``step_ms`` above 0, the rest of the step, adds the efficiency.
    """
    presets = list(dict.fromkeys(step.preset for step in steps))
    lines = _head("ranks", "over", "a call", "GB/s", *presets)
    for ranks, link in links.items():
        waits = [step.total_ms(link) for step in steps if step.ranks == ranks]
        cells = [
            f"{ms:.3g} ms" + (f", {step_ms / (step_ms + ms):.0%}" if step_ms else "")
            for ms in waits
        ]
        about = [link.name, f"{link.latency_us:,.1f} us", f"{link.gb_per_s:.3g}"]
        lines.append(_row(str(ranks), *about, *cells))
    return "\n".join(lines)


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|---" * len(cells) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _size(size: float) -> str:
    unit = next(unit for unit in ("MB", "kB", "B") if size >= _UNITS[unit])
    return f"{size / _UNITS[unit]:.3g} {unit}"


def main() -> None:
    """Count and measure; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 64])
    parser.add_argument("--gloo", type=int, nargs="*", default=[2, 4], help="ranks to measure")
    parser.add_argument("--presets", nargs="+", choices=KNOWN, default=PRESETS)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=10.0, help="of a step without collectives")
    args = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"{key}: {value}")
    steps = count_all(args.presets, args.ranks, args.width)
    size = max(sent.bytes for step in steps for sent in step.sent.values())
    published = {ranks: link_of(ranks) for ranks in args.ranks if ranks > 1}
    measured = {ranks: gloo(ranks, size) for ranks in args.gloo}
    print("\n" + kinds_table([step for step in steps if step.ranks == args.ranks[-1]]))
    print(f"\n{args.step_ms:g} ms per step besides its collectives:\n")
    print(cost_table(steps, published, args.step_ms))
    if measured:
        print("\n" + cost_table(steps, measured, 0))
    columns = ["preset", "ranks", "kind", "calls", "bytes", "ring_bytes", *Link._fields, "ms"]
    rows: list[list[object]] = [
        [step.preset, step.ranks, kind, *sent, step.ring_bytes(kind), *link, step.ms(kind, link)]
        for step in steps
        for link in (published.get(step.ranks), measured.get(step.ranks))
        for kind, sent in step.sent.items()
        if link is not None
    ]
    print(harness.write_rows("collectives", columns, rows))


if __name__ == "__main__":
    sys.exit(main())
