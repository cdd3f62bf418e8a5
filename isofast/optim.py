"""Optimizers: parameter groups, LARS, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from isofast.config import Config
from isofast.networks import Online

REFERENCE_BATCH = 256


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, as in the released code, without host synchronisation.

    g' = (g + wd p) min(eta |p| / (|g| + wd |p| + 1e-8) / lr, 1); v <- momentum v + g';
    p <- p - lr v.
    Groups with ``adapt`` False get momentum SGD with their own weight decay; a parameter with
    |p| = 0 or |g| = 0 gets neither decay nor adaptation in that step.

    Args:
        params: parameters or groups; a group may set ``adapt``.
        lr: learning rate.
        momentum: decay of the velocity.
        weight_decay: wd.
        eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.02,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("LARS takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            direction = self._adapted if group["adapt"] else self._plain
            grads = direction(params, grads, group)
            for p in params:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, grads)
            torch._foreach_add_(params, velocities, alpha=-group["lr"])

    @staticmethod
    def _plain(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        if group["weight_decay"] == 0:
            return grads
        return list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))

    @staticmethod
    def _adapted(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        wd, lr = group["weight_decay"], group["lr"]
        p_norm = torch.stack(torch._foreach_norm(params))
        g_norm = torch.stack(torch._foreach_norm(grads))
        applies = (p_norm > 0) & (g_norm > 0)
        trust = group["eta"] * p_norm / (g_norm + wd * p_norm + 1e-8)
        # a rate of 0 moves nothing, whatever the scale
        scale = torch.where(applies, (trust / max(lr, 1e-38)).clamp(max=1), 1.0)
        decay = torch.where(applies, wd * scale, 0.0)
        scaled = torch._foreach_mul(grads, list(scale.unbind()))
        torch._foreach_add_(scaled, torch._foreach_mul(params, list(decay.unbind())))
        return list(scaled)


def make_optimizer(online: Online, config: Config) -> Optimizer:
    """The configured optimizer over the network's and the probe's parameters.

    Each group carries ``peak_lr``, from which ``set_lr`` makes its rate at a step. Learning rates
    scale with the global batch, relative to 256.
    """
    settings = config.optimizer
    scale = config.train.batch_size / REFERENCE_BATCH
    lr, probe_lr = settings.lr * scale, settings.probe_lr * scale
    matrices = [p for p in online.branch.parameters() if p.ndim > 1]
    vectors = [p for p in online.branch.parameters() if p.ndim <= 1]
    decay = settings.weight_decay
    probe: dict[str, Any] = {
        "params": list(online.probe.parameters()),
        "peak_lr": probe_lr,
        "weight_decay": 0.0,
    }
    if settings.name == "sgd":
        network = {"params": [*matrices, *vectors], "peak_lr": lr, "weight_decay": decay}
        return SGD([network, probe], lr=lr, momentum=settings.momentum)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "peak_lr": lr, "weight_decay": decay},
        {"params": vectors, "peak_lr": lr, "weight_decay": 0.0},
        probe,
    ]
    if settings.name == "adamw":
        return AdamW(groups, lr=lr, betas=(settings.momentum, 0.999))
    groups[0]["adapt"] = True
    groups[1]["adapt"] = groups[2]["adapt"] = False
    return LARS(groups, lr=lr, momentum=settings.momentum, eta=settings.eta)


def lr_at(
    step: int, peak: float, *, total_steps: int, warmup_steps: int, warmup_start: float
) -> float:
    """Learning rate of a step: linear from ``warmup_start`` to ``peak``, half a cosine to 0."""
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2


def set_lr(optimizer: Optimizer, step: int, steps_per_epoch: int, config: Config) -> float:
    """Gives every group its rate at ``step``; returns the first group's, the network's."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(
            step,
            group["peak_lr"],
            total_steps=config.train.epochs * steps_per_epoch,
            warmup_steps=round(config.warmup_epochs * steps_per_epoch),
            warmup_start=config.schedule.warmup_start,
        )
    return float(optimizer.param_groups[0]["lr"])
