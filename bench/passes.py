"""Time the optimizer and EMA target updates of a ResNet-18 with projector.

    python bench/passes.py [--width 64] [--rounds 31]

LARS: ours, with the learning rate in a tensor; the code released with the paper, which loops over
tensors and compares norms on the host; and, as a floor, torch's foreach SGD, which does not adapt
the rate. Target: ours; a loop over tensors; torch's moving average, whose weight is a float.
Results go to bench/results/passes-NNN.csv and .png, never overwriting earlier ones.
"""

import argparse
import sys

import harness
import torch
from harness import Contender, Question, Work
from torch import Tensor
from torch.optim import SGD
from torch.optim.swa_utils import get_ema_multi_avg_fn

from isofast.config.schema import EncoderConfig, ProjectorConfig
from isofast.methods.ema import EmaTarget
from isofast.methods.networks import Branch
from isofast.training.optim import LARS

WD, ETA, MOMENTUM = 1e-4, 0.02, 0.9
TESTS = ["tests/training/test_optim.py"]


def released_lars(params: list[Tensor], velocities: list[Tensor], lr: float) -> None:
    """The released code's step (2e8d364): three host comparisons per tensor with ndim > 1."""
    for p, v in zip(params, velocities, strict=True):
        g = p.grad
        if p.ndim > 1:
            p_norm, g_norm = torch.norm(p.data), torch.norm(g.data)
            if p_norm != 0 and g_norm != 0:
                trust = ETA * p_norm / (g_norm + p_norm * WD + 1e-8)
                g = (g + WD * p) * min(trust / lr, 1)
        v.mul_(MOMENTUM).add_(g)
        p.add_(v, alpha=-lr)


def network(width: int) -> Branch:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = EncoderConfig(stem="cifar", width=width)
    branch = Branch(encoder, ProjectorConfig(), torch.float32).to(device)
    for p in branch.parameters():
        p.grad = torch.randn_like(p)
    return branch


def lars_contenders(width: int) -> tuple[list[Contender], Work]:
    ours, theirs, floor = (network(width) for _ in range(3))
    device = next(ours.parameters()).device
    rate = torch.tensor(1e-6, device=device)
    groups = [
        {"params": [p for p in ours.parameters() if p.ndim > 1], "weight_decay": WD},
        {"params": [p for p in ours.parameters() if p.ndim <= 1], "adapt": False},
    ]
    lars = LARS(groups, lr=rate, momentum=MOMENTUM, eta=ETA)
    params = list(theirs.parameters())
    velocities = [torch.zeros_like(p) for p in params]
    sgd = SGD(floor.parameters(), lr=1e-6, momentum=MOMENTUM, weight_decay=WD, foreach=True)

    @torch.no_grad()
    def released() -> None:
        released_lars(params, velocities, 1e-6)

    # reads p, g and v, writes p and v
    return [
        Contender("isofast LARS", lars.step),
        Contender("the released code's way", released),
        Contender("torch SGD, foreach", sgd.step, "no adaptation: a floor"),
    ], Work(5 * sum(p.numel() * p.element_size() for p in params))


def target_contenders(width: int) -> tuple[list[Contender], Work]:
    online = network(width)
    target = EmaTarget(online, base=0.99)
    pairs = list(zip(target.parameters(), online.parameters(), strict=True))
    average = get_ema_multi_avg_fn(0.99)

    @torch.no_grad()
    def loop() -> None:
        for t, p in pairs:
            t.mul_(0.99).add_(p, alpha=0.01)

    def torch_own() -> None:
        average([t.data for t, _ in pairs], [p.data for _, p in pairs], 1)

    return [
        Contender("isofast", lambda: target.move_(online)),
        Contender("tensor by tensor", loop),
        Contender("torch.optim.swa_utils", torch_own, "tau is a float"),
    ], Work(3 * sum(t.numel() * t.element_size() for t, _ in pairs))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--rounds", type=int, default=31, help="n")
    options = parser.parse_args(arguments)
    of = f"ResNet-18 of width {options.width} and projector"
    questions = [
        Question(f"LARS, {of}", TESTS, lambda: lars_contenders(options.width)),
        Question(f"target, {of}", TESTS, lambda: target_contenders(options.width)),
    ]
    return harness.run("passes", questions, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
