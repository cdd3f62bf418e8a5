"""The whole training step on the meta device: no host syncs, and a fixed number of operations.

Meta tensors have no values, so reading one on the host (.item(), .tolist(), a mask's size) raises.
Counted are dispatched operations that are not views, each at least one kernel launch on a GPU, in
fp32 without torch.compile, with both views in one call as on a GPU; our own kernels count as one.

A step "on a GPU" is the one that torch.compile gets there: bf16, fused BatchNorm, joined ReLUs.
Autocast ignores meta tensors, and fake CUDA tensors have no backward pass without a GPU: these are
fake CPU tensors under the CPU's autocast, which casts as often in these networks as the GPU's.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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
FUSED = EMA | {
    "target": (580, 22_574),
    "forward": (580, 22_574),
    "probe": (16, 3),
    "backward": (660, 35_121),
}
BUDGET = {
    "isoloss": EMA,
    "isoloss without EMA": NETWORK,
    "byol": EMA | {"loss": (10, 71), "backward": (194, 15_978), "optimizer": (33, 855)},
    # the directions' hash and the test, all small
    "sigreg without EMA": NETWORK | {"loss": (85, 100), "backward": (204, 16_033)},
    "isoloss on a GPU": FUSED,
    "byol on a GPU": FUSED | {"loss": (58, 251), "backward": (736, 35_496), "optimizer": (33, 855)},
    # with the pool in BatchNorm
    "isoloss on a GPU, tiny stem": FUSED
    | {"target": (572, 6_328), "forward": (572, 6_328), "backward": (644, 8_592)},
}
# the same operations by kind: names' parts, and the rest
_NAMED = (
    *("convolution", "batch_norm", "mm.", "foreach", "isofast_kernels"),
    *("_to_copy", "copy_", "clone", "cat."),
)
KINDS = {
    "isoloss": (60, 126, 12, 18, 3, 0, 2, 0, 66, 169),
    "isoloss without EMA": (40, 84, 10, 15, 3, 0, 2, 0, 45, 141),
    "byol": (60, 130, 24, 18, 2, 0, 2, 0, 66, 183),
    "sigreg without EMA": (40, 84, 12, 15, 1, 0, 2, 2, 45, 253),
    "isoloss on a GPU": (60, 0, 12, 18, 3, 266, 3, 219, 3, 1298),
    "byol on a GPU": (60, 0, 24, 18, 2, 294, 3, 233, 3, 1376),
    "isoloss on a GPU, tiny stem": (60, 0, 12, 18, 7, 259, 3, 208, 3, 1280),
}
# operations that touch no memory
_FREE = (
    *("aten.empty.memory_format", "aten.detach.default"),
    *("aten.as_strided_.default", "prim.device.default"),
)


class Counting(TorchDispatchMode):
    """Counts operations and bytes by part, and rejects tensors that are not on ``device``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.part = ""
        self.operations: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # the step marks its parts; the optimizer marks itself
        if str(func) == "profiler._record_function_enter_new.default" and args[0] in EMA:
            self.part = args[0]
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        for tensor in tensors:
            if tensor.device != self.device:
                raise AssertionError(f"{func}: a tensor of {tensor.device} on the way")
        if not (func.is_view or str(func) in _FREE or func.namespace == "profiler"):
            self.operations[self.part] += 1
            self.kinds[next((kind for kind in _NAMED if kind in str(func)), "other")] += 1
            self.bytes[self.part] += sum(x.numel() * x.element_size() for x in tensors)
        return out


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """Build for a GPU and leave out torch.compile, with tensors that are fake and on a CPU."""

    def to(module: nn.Module, *_: Any, **how: Any) -> None:
        # torch's own cannot replace a fake parameter
        for p in module.parameters():
            if how and p.ndim == 4:
                p.data = p.data.to(**how)

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensor, "is_cpu", False)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
        patch.setattr(nn.Module, "to", to)
        patch.setattr(nn.Module, "compile", lambda *_, **options: None)
        patch.setattr(torch, "compile", lambda function, **options: function)
        # which build sets
        patch.setattr(torch.backends.cudnn, "benchmark", False)
        yield torch.device("cuda")


def step_of(name: str) -> Counting:
    """Count the second step of a CIFAR-10 preset with LARS; the first creates optimizer state."""
    gpu, stem = "GPU" in name, "tiny" if "tiny" in name else "cifar"
    raw: dict[str, Any] = {"data": {"dataset": "cifar10", "root": "x"}, "encoder": {"stem": stem}}
    raw["method"] = {"name": name.partition(" ")[0], "ema": "without" not in name}
    raw["train"] = {"precision": "bf16" if gpu else "fp32", "cuda_graph": "on"}
    config = validate(raw | {"optimizer": {"name": "lars"}})
    device = torch.device("cpu" if gpu else "meta")
    with fake_gpu() if gpu else device as on, Counting(device) as counting, timed_parts():
        state = build(config, World(0, 1, 0, on), 10)
        take_step = GraphedStep(state.step, device)
        batch = Batch(torch.empty(512, 3, 32, 32), torch.empty(256, dtype=torch.int64))
        for step in range(2):
            for counter in (counting.operations, counting.kinds, counting.bytes):
                counter.clear()
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
    kinds = dict(zip((*_NAMED, "other"), KINDS[name], strict=True))
    assert counting.kinds == Counter(kinds)
    for part, (_, megabytes) in BUDGET[name].items():
        assert counting.bytes[part] <= megabytes * 10**6, part


@_COUNTED
def test_both_views_in_one_call_save_operations(monkeypatch):
    def separate(*arguments: Any, **options: Any) -> Branch:
        return Branch(*arguments, **(options | {"stacked": False}))

    monkeypatch.setattr("isofast.training.build.Branch", separate)
    stacked = sum(operations for operations, _ in BUDGET["isoloss"].values())
    assert (stacked, step_of("isoloss").operations.total()) == (456, 567)


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        (lambda z_BD: z_BD.mean().item(), r"item\(\)"),
        (lambda z_BD: z_BD[0].tolist()[0], "no data"),
        (lambda z_BD: len(z_BD.nonzero()), "nonzero"),
        (lambda z_BD: len(z_BD[z_BD > 0]), "nonzero"),
        (lambda _: torch.ones((), device="cpu"), "a tensor of cpu on the way"),
    ],
    ids=["item", "tolist", "nonzero", "mask", "cpu"],
)
def test_what_waits_for_the_device_is_found(wait, message, monkeypatch):
    class Waits(IsoLoss):
        def loss(self, views: Views) -> Tensor:
            return super().loss(views) * wait(views.z1_BD.detach())

    monkeypatch.setattr("isofast.training.build.make_method", Waits)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        step_of("isoloss")
