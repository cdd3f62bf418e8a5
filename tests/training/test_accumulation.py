"""Micro-batches: equal to the whole batch where they must be, in less memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from isofast.config.schema import Config
from isofast.data import Batch
from isofast.errors import UserError
from isofast.methods.networks import _join_relus
from isofast.training.build import TrainState, build, is_graphed

from ..support.runs import ALONE, assert_same_run, train

MakeConfig = Callable[..., Config]


class Short(nn.Module):
    """An encoder that compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.bn1(self.conv1(x_BCHW)).relu()
        return (h_BCHW + self.bn2(self.conv2(h_BCHW))).relu().mean((2, 3))


def state_of(
    small_config: MakeConfig, pieces: int, encoder: str = "resnet18", **method: object
) -> TrainState:
    """Build the networks in float64, without DeepSpeed's engine."""
    train = {"precision": "fp32", "cuda_graph": "on"}
    network = {"name": encoder, "width": 4 if encoder == "resnet18" else 64}
    config = small_config(train=train, method=method, encoder=network)
    state = build(config, ALONE, 10)
    for module in (state.online, state.target):
        if module is not None:
            module.branch.double().pieces = pieces
    return state


def test_a_batchnorm_that_is_not_torchs_counts_each_piece_once(small_config):
    """The recomputation of a piece moves none of its statistics."""
    state = state_of(small_config, 2, "timm:regnetx_002", ema=False)
    norm = next(m for m in state.online.modules() if type(m).__name__ == "BatchNormAct2d")
    batch = repeated_batch(2)
    state.online(batch).loss.backward()
    # two views of two pieces
    assert norm.num_batches_tracked == 4


def repeated_batch(pieces: int) -> Batch:
    """Return 8 images per view, the same ones in each micro-batch, so that statistics agree."""
    x_VBCHW = torch.randn(2, 8 // pieces, 3, 16, 16, dtype=torch.float64)
    x_NCHW = x_VBCHW.repeat(1, pieces, 1, 1, 1).flatten(0, 1)
    return Batch(x_NCHW.contiguous(memory_format=torch.channels_last), torch.arange(8) % 10)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["apart", "stacked", "fused"])
def test_pieces_equal_the_whole_batch(small_config, kind, compiled):
    """Loss, gradients, C and target; running statistics move once per micro-batch and view.

    The whole batch runs eagerly and unfused.
    """
    # networks compiled by other tests count towards the compiler's limit
    torch._dynamo.reset()
    stacked = kind != "apart"
    batch = repeated_batch(2)
    found: list[dict[str, Tensor]] = []
    for pieces in (1, 2):
        encoder = f"{__name__}:Short" if compiled else "resnet18"
        state = state_of(small_config, pieces, encoder, name="isoloss", ema=True)
        online, target = state.online.train(), state.target
        for branch in (online.branch, target.branch):
            branch.stacked = stacked
            for norm in branch.modules():
                if hasattr(norm, "views"):
                    norm.views = 1 + stacked
                    norm.fused = kind == "fused" and pieces == 2
            if kind == "fused" and pieces == 2:
                _join_relus(branch)
            if compiled and pieces == 2:
                branch.compile()
        output = online(batch, target(batch))
        output.loss.backward()
        left = dict(online.branch.named_buffers())
        # from zero by 0.1 towards the same mean, twice per micro-batch
        share = {name: 1 - 0.9 ** (2 * pieces) for name in left if name.endswith("mean")}
        found.append(
            {
                "loss": output.loss.detach(),
                "C": online.method.correlation.corr_DD,
                "t": target(batch)[0],
            }
            | {name: p.grad for name, p in online.branch.named_parameters()}
            | {name: left[name] / share[name] for name in share if name.startswith("encoder.bn1")}
        )
    whole, parts = found
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_pieces_keep_the_order_of_rows_and_views(small_config):
    """In eval mode, where rows do not depend on each other, on different images."""
    branch = state_of(small_config, 1).online.eval().branch
    batch = Batch(torch.randn(16, 3, 16, 16, dtype=torch.float64), torch.arange(8))
    whole = branch.of_views(batch)
    branch.pieces = 4
    torch.testing.assert_close(branch.of_views(batch), whole)


def test_activations_of_pieces_are_not_held(small_config):
    batch = repeated_batch(4)
    held = []
    for pieces in (1, 4):
        online = state_of(small_config, pieces).online.train()
        sizes: list[int] = []

        def count(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            online.branch.of_views(batch)
        held.append(sum(sizes))
    assert held[1] < held[0] / 5


def test_a_batch_that_does_not_divide_is_refused(small_config, monkeypatch):
    config = small_config(train={"batch_size": 12, "accumulation": 4})
    with pytest.raises(UserError, match=r"processes times train\.accumulation=4.*batch_size=16"):
        config.batch_size_per_rank(2)
    monkeypatch.setattr("isofast.training.build.make_engine", lambda *_: None)
    assert build(small_config(train={"accumulation": 2}), ALONE, 10).online.branch.pieces == 2
    config = small_config(train={"accumulation": 2, "cuda_graph": "on"})
    with pytest.raises(UserError, match=r"needs one process and train.accumulation=1"):
        is_graphed(config, ALONE)


@pytest.mark.long
def test_a_run_in_pieces_goes_on_bitwise(config_file, tmp_path):
    config = config_file(train={"accumulation": 2}, method={"ema": True})
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", "--set", "train.max_steps=3")
    train(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
