"""Optimizers: parameter groups, LARS, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from isofast.config.schema import Config
from isofast.methods.foreach import add_each_scaled_, add_scaled_
from isofast.training.step import Online

REFERENCE_BATCH = 256


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, as in the released code, without host syncs.

    g' = (g + wd p) min(eta |p| / (|g| + wd |p| + 1e-8) / lr, 1); v <- momentum v + g';
    p <- p - lr v.
    Groups with ``adapt`` False get momentum SGD with their own weight decay; a parameter with
    |p| = 0 or |g| = 0 gets neither decay nor adaptation in that step.

    Args:
        params: parameters or groups; a group may set ``adapt``.
        lr: learning rate, a number or a 0-dimensional tensor on the parameters' device. A tensor
            is read only there, so a replayed CUDA graph uses its current value.
        momentum: decay of the velocity.
        weight_decay: wd.
        eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
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
        """Update every parameter that has a gradient."""
        groups = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in params]
            lr = torch.as_tensor(group["lr"], dtype=params[0].dtype, device=params[0].device)
            settings = [group[name] for name in ("momentum", "weight_decay", "eta", "adapt")]
            groups.append((params, [p.grad for p in params], velocities, lr, *settings))
        self.update(groups)

    @staticmethod
    def update(groups: list[tuple[Any, ...]]) -> None:
        """Apply the step to groups of (params, grads, velocities, lr, momentum, wd, eta, adapt).

        torch.compile turns it into a single pass.
        """
        for params, grads, velocities, lr, momentum, wd, eta, adapt in groups:
            torch._foreach_mul_(velocities, momentum)
            if adapt:
                # with a learning rate of 0 nothing moves, whatever the scale
                rate = lr.clamp(min=1e-38)
                p_norm = torch.stack(torch._foreach_norm(params))
                g_norm = torch.stack(torch._foreach_norm(grads))
                applies = (p_norm > 0) & (g_norm > 0)
                trust = eta * p_norm / (g_norm + wd * p_norm + 1e-8)
                scale = torch.where(applies, (trust / rate).clamp(max=1), 1.0)
                decay = torch.where(applies, wd * scale, 0.0)
                add_each_scaled_(velocities, grads, scale.unbind())
                add_each_scaled_(velocities, params, decay.unbind())
            else:
                torch._foreach_add_(velocities, grads)
                if wd:
                    torch._foreach_add_(velocities, params, alpha=wd)
            add_scaled_(params, velocities, lr, value=-1)


def make_optimizer(online: Online, config: Config) -> Optimizer:
    """Return the configured optimizer over the network, method and probe parameters.

    Each group has ``peak_lr``, from which ``set_lr`` computes the learning rate at a step, and the
    learning rate itself as a tensor on the parameters' device. Peak learning rates are scaled by
    the global batch size / 256.
    """
    settings = config.optimizer
    scale = config.train.batch_size / REFERENCE_BATCH
    network: list[Tensor] = [*online.branch.parameters(), *online.method.parameters()]
    matrices = [p for p in network if p.ndim > 1]
    vectors = [p for p in network if p.ndim <= 1]

    def group(params: Sequence[Tensor], lr: float, decay: float, **more: Any) -> dict[str, Any]:
        peak = lr * scale
        rate = torch.tensor(peak, device=params[0].device)
        return {"params": list(params), "lr": rate, "peak_lr": peak, "weight_decay": decay, **more}

    def probe(**more: Any) -> dict[str, Any]:
        return group(list(online.probe.parameters()), settings.probe_lr, 0.0, **more)

    decay = settings.weight_decay
    if settings.name == "sgd":
        groups = [group([*matrices, *vectors], settings.lr, decay), probe()]
        # the fused implementation reads a learning-rate tensor without a host sync
        return SGD(groups, momentum=settings.momentum, fused=True)
    if settings.name == "adamw":
        groups = [group(matrices, settings.lr, decay), group(vectors, settings.lr, 0.0), probe()]
        # capturable keeps the step count on the device, where a CUDA graph can advance it
        cuda = network[0].is_cuda
        return AdamW(groups, betas=(settings.momentum, 0.999), fused=True, capturable=cuda)
    groups = [
        group(matrices, settings.lr, decay, adapt=True),
        group(vectors, settings.lr, 0.0, adapt=False),
        probe(adapt=False),
    ]
    return LARS(groups, lr=settings.lr * scale, momentum=settings.momentum, eta=settings.eta)


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a ``state_dict``'s tensors, keeping the groups' settings, which depend on the device."""
    own = [{k: v for k, v in one.items() if k != "params"} for one in optimizer.param_groups]
    optimizer.load_state_dict(state)
    # fused implementations need the weights' strides, which copies to the CPU may lose
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def lr_at(
    step: int, peak: float, *, total_steps: int, warmup_steps: int, warmup_start: float
) -> float:
    """Return a step's rate: linear warm-up from ``warmup_start`` to ``peak``, cosine decay to 0."""
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2


def set_lr(optimizer: Optimizer, step: int, steps_per_epoch: int, config: Config) -> float:
    """Set every group's learning rate for ``step`` in place, without a host sync.

    Returns:
        The first group's learning rate, that of the network.
    """
    rates = [
        lr_at(
            step,
            group["peak_lr"],
            total_steps=config.train.epochs * steps_per_epoch,
            warmup_steps=round(config.warmup_epochs * steps_per_epoch),
            warmup_start=config.schedule.warmup_start,
        )
        for group in optimizer.param_groups
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].fill_(rate)
    return rates[0]
