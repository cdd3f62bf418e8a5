"""The whole training step on the meta device: no host syncs, and a fixed number of operations.

Meta tensors have no values, so reading one on the host (.item(), .tolist(), a mask's size) raises.
Counted are dispatched operations that are not views, each at least one kernel launch on a GPU, in
fp32 without torch.compile, with both views in one call as on a GPU; our own kernels count as one.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isofast.config.load import validate
from isofast.data import Batch
from isofast.distributed import World
from isofast.methods import Views
from isofast.methods.closed_form import IsoLoss
from isofast.methods.networks import Branch
from isofast.training.build import build
from isofast.training.graph import GraphedStep
from isofast.training.optim import set_lr
from isofast.training.parts import timed_parts

# operations in each part of a step, and the 10^6 bytes that they read and write, at batch size 256;
# a change that raises a number must say why
NETWORK = {
    # learning rates, and the copy of the batch to where the graph reads it
    "before": (5, 19),
    "forward": (112, 11_593),
    "correlation": (1, 1),
    "loss": (3, 3),
    "probe": (14, 2),
    "backward": (172, 15_824),
    "optimizer": (33, 745),
}
EMA = NETWORK | {"before": (6, 19), "target": (112, 11_593), "target's move": (3, 402)}
BUDGET = {
    "isoloss": EMA,
    "isoloss without EMA": NETWORK,
    "byol": EMA | {"loss": (10, 71), "backward": (194, 15_978), "optimizer": (33, 855)},
    # the directions' hash and the test, all small
    "sigreg without EMA": NETWORK | {"loss": (85, 100), "backward": (204, 16_033)},
}
# operations that touch no memory
_FREE = ("aten.empty.memory_format", "aten.detach.default")


class Counting(TorchDispatchMode):
    """Counts operations and bytes by part, and rejects tensors that are not on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.operations: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # the step marks its parts; the optimizer marks itself
        if str(func) == "profiler._record_function_enter_new.default" and args[0] in EMA:
            self.part = args[0]
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        for tensor in tensors:
            if not tensor.is_meta:
                raise AssertionError(f"{func}: a tensor of {tensor.device} on the way")
        if not (func.is_view or str(func) in _FREE or func.namespace == "profiler"):
            self.operations[self.part] += 1
            self.bytes[self.part] += sum(x.numel() * x.element_size() for x in tensors)
        return out


def step_of(name: str) -> Counting:
    """Count the second step of a CIFAR-10 preset with LARS; the first creates optimizer state."""
    name, _, without = name.partition(" without ")
    raw: dict[str, Any] = {"data": {"dataset": "cifar10", "root": "x"}}
    raw["method"] = {"name": name, "ema": not without}
    raw["train"] = {"precision": "fp32", "cuda_graph": "on"}
    config = validate(raw | {"optimizer": {"name": "lars"}})
    meta = torch.device("meta")
    with meta, Counting() as counting, timed_parts():
        state = build(config, World(0, 1, 0, meta), 10)
        take_step = GraphedStep(state.step, meta)
        batch = Batch(torch.empty(512, 3, 32, 32), torch.empty(256, dtype=torch.int64))
        for step in range(2):
            counting.operations.clear()
            counting.bytes.clear()
            counting.part = "before"
            set_lr(state.optimizer, step, 195, config)
            if state.target is not None:
                state.target.set_decay(step / 1000)
            take_step(batch)
    return counting


_COUNTED = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="earlier versions have more operations in the backward pass"
)


@_COUNTED
@pytest.mark.parametrize("name", BUDGET)
def test_a_step_keeps_within_its_operations_and_bytes(name):
    counting = step_of(name)
    assert dict(counting.operations) == {part: n for part, (n, _) in BUDGET[name].items()}
    for part, (_, megabytes) in BUDGET[name].items():
        assert counting.bytes[part] <= megabytes * 10**6, part


@_COUNTED
def test_both_views_in_one_call_save_operations(monkeypatch):
    def separate(*arguments: Any, **options: Any) -> Branch:
        return Branch(*arguments, **(options | {"stacked": False}))

    monkeypatch.setattr("isofast.training.build.Branch", separate)
    stacked = sum(operations for operations, _ in BUDGET["isoloss"].values())
    assert (stacked, step_of("isoloss").operations.total()) == (456, 567)


class Reads(IsoLoss):
    """Causes a host sync."""

    def loss(self, views: Views) -> Tensor:
        return super().loss(views) * float(views.z1_BD.mean())


class Strays(IsoLoss):
    """Uses a CPU tensor."""

    def loss(self, views: Views) -> Tensor:
        return super().loss(views) + torch.ones((), device="cpu")


@pytest.mark.parametrize(
    ("method", "message"), [(Reads, r"item\(\)|meta"), (Strays, "a tensor of cpu on the way")]
)
def test_what_waits_for_the_device_is_found(method, message, monkeypatch):
    monkeypatch.setattr("isofast.training.build.make_method", method)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        step_of("isoloss")
