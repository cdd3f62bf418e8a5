"""The whole training step on the meta device: no wait for the device, and so many operations.

On meta a tensor has no values: what reads one on the host (.item(), .tolist(), a mask's size)
raises. The counts are of dispatched operations that are not views, each a launch or more on a GPU,
in fp32 without torch.compile, both views in one call as on a GPU; a kernel of ours counts as one.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isofast.config.load import validate
from isofast.config.plugins import method_class
from isofast.data import Batch
from isofast.methods import Method, Views
from isofast.methods.batch_norm import convert_batch_norm
from isofast.methods.closed_form import IsoLoss
from isofast.methods.ema import EmaTarget
from isofast.methods.networks import Branch
from isofast.training.optim import make_optimizer, set_lr
from isofast.training.step import Online

# Operations of each part of a step, and the 10^6 bytes that they read and write, at batch 256.
# A change that raises one says why.
NETWORK = {
    "rates": (3, 1),
    "forward": (130, 11_598),
    "backward": (173, 15_824),
    "optimizer": (33, 745),
}
TARGET = {"target": (112, 11_594), "target's move": (4, 402)}
BUDGET = {
    "isoloss": NETWORK | TARGET,
    "isoloss without EMA": NETWORK,
    "byol": {
        **(NETWORK | TARGET),
        "forward": (137, 11_666),
        "backward": (195, 15_978),
        "optimizer": (33, 855),
    },
    # the directions' hash and the test, all small
    "sigreg without EMA": {**NETWORK, "forward": (212, 11_707), "backward": (204, 16_033)},
}
# Memory that is not touched, and the profiler's marks.
_FREE = ("aten.empty.memory_format", "aten.detach.default")


class Counting(TorchDispatchMode):
    """Counts operations and bytes by part, and refuses a tensor that is not on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.operations: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        for tensor in tensors:
            if not tensor.is_meta:
                raise AssertionError(f"{func}: a tensor of {tensor.device} on the way")
        if not (func.is_view or str(func) in _FREE or func.namespace == "profiler"):
            self.operations[self.part] += 1
            self.bytes[self.part] += sum(x.numel() * x.element_size() for x in tensors)
        return out


def step_of(name: str, *, stacked: bool = True, method: type[Method] | None = None) -> Counting:
    """The second step of a CIFAR-10 preset with LARS; the first makes the optimizer's state."""
    name, _, without = name.partition(" without ")
    raw: dict[str, Any] = {"data": {"dataset": "cifar10", "root": "x"}, "method": {"name": name}}
    raw["method"]["ema"] = not without
    config = validate(raw | {"optimizer": {"name": "lars"}})
    with torch.device("meta"), Counting() as counting:
        branch = Branch(config.encoder, config.projector, torch.float32, 32, stacked=stacked)
        made = (method or method_class(name))(config.method, config.projector)
        convert_batch_norm(made, views=1, synchronised=False)
        online = Online(branch, nn.Linear(branch.features_out, 10), made)
        target = EmaTarget(branch, config.method.ema_base) if config.method.ema else None
        batch = Batch(torch.empty(512, 3, 32, 32), torch.empty(256, dtype=torch.int64))
        optimizer = make_optimizer(online, config)
        for step in range(2):
            counting.operations.clear()
            counting.bytes.clear()
            counting.part = "rates"
            set_lr(optimizer, step, 195, config)
            counting.part = "target"
            targets = None if target is None else target(batch)
            counting.part = "forward"
            output = online(batch, targets)
            counting.part = "backward"
            (output.loss + output.probe.loss).backward()
            counting.part = "optimizer"
            optimizer.step()
            optimizer.zero_grad()
            if target is not None:
                counting.part = "target's move"
                target.set_decay(step / 1000)
                target.move_(online.branch)
    return counting


@pytest.mark.parametrize("name", BUDGET)
def test_a_step_keeps_within_its_operations_and_bytes(name: str) -> None:
    counting = step_of(name)
    assert dict(counting.operations) == {part: n for part, (n, _) in BUDGET[name].items()}
    for part, (_, megabytes) in BUDGET[name].items():
        assert counting.bytes[part] <= megabytes * 10**6, part


def test_both_views_in_one_call_save_operations() -> None:
    one, two = (step_of("isoloss", stacked=stacked).operations for stacked in (True, False))
    assert (one.total(), two.total()) == (455, 566)


class Reads(IsoLoss):
    """Waits for the device."""

    def loss(self, views: Views) -> Tensor:
        return super().loss(views) * float(views.z1_BD.mean())


class Strays(IsoLoss):
    """Takes a tensor of the host."""

    def loss(self, views: Views) -> Tensor:
        return super().loss(views) + torch.ones((), device="cpu")


@pytest.mark.parametrize(
    ("method", "message"), [(Reads, r"item\(\)|meta"), (Strays, "a tensor of cpu on the way")]
)
def test_what_waits_for_the_device_is_found(method: type[Method], message: str) -> None:
    with pytest.raises((RuntimeError, AssertionError), match=message):
        step_of("isoloss", method=method)
