"""The loss as a module, for your own training loop.

Shapes: B images per rank, D embedding dimensions.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .arguments import as_updating_views
from .ops import asymmetric_loss_pair, correlation_ema_, matrix_power, second_moment
from .reference import mirror_lower


class IsoLoss(nn.Module):
    """2 (L(z1 -> t2) + L(z2 -> t1)) with the predictor W = f(C), C a moving average of z z^T.

    Halvagal, Laborieux, Zenke: Implicit variance regularization in non-contrastive SSL (NeurIPS
    2023), Eqs. 1, 15 and 17. With ``isotropic`` False this is the loss of DirectPred, or of
    DirectCopy at alpha 1.

    Args:
        dim: D, at most 8192 on a GPU.
        alpha: power of C.
        eps: shift of the eigenvalues before the power; the released code uses 0.25 at alpha 1.
        decay: EMA decay of C per step; the paper uses 0.998, its code 0.5 without EMA target.
        metric: "cosine", which divides C by its largest eigenvalue, or "euclidean", which does not.
        isotropic: omit the factor W from the gradient.
        gather_distributed: average C over the ranks, so that the averaged gradient equals that of
            one process on the whole batch. Otherwise C is local to each rank, or the first rank's
            if DDP wraps this module too and broadcasts its buffers. All ranks must call the module
            together, with the same number of rows.

    C is part of the state: save it with the network. It is updated once per call, so with gradient
    accumulation over k calls it is updated k times per optimizer step, and each call's loss uses
    the current C; decay^(1/k) gives the same memory as ``decay`` without accumulation.

    Attributes:
        corr_DD: C, (D, D), a buffer that starts at 0; float32 or float64, and float32 even in a
            module converted to bf16 or fp16.
    """

    corr_DD: Tensor

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 0.5,
        eps: float = 0.0,
        decay: float = 0.998,
        metric: str = "cosine",
        isotropic: bool = True,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        # Lightning may construct the module with bf16 as the default dtype
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("corr_DD", torch.zeros(dim, dim, dtype=dtype))
        self.alpha, self.eps, self.decay = alpha, eps, decay
        self.metric, self.isotropic = metric, isotropic
        self.gather_distributed = gather_distributed

    def reset_parameters(self) -> None:
        """Set C to 0, for example after materialising a module built on the meta device."""
        self.corr_DD.zero_()

    def forward(
        self, z1_BD: Tensor, z2_BD: Tensor, t1_BD: Tensor | None = None, t2_BD: Tensor | None = None
    ) -> Tensor:
        """Update C in train() mode, then return the loss at W = f(C).

        Args:
            z1_BD, z2_BD: embeddings of both views, (B, D), fp32, bf16 or fp16; differentiable.
            t1_BD, t2_BD: targets, such as a momentum encoder's embeddings; by default z1 and z2. No
                gradient flows through them.

        Returns:
            The loss, a scalar in fp32; on a CPU fp64 embeddings or an fp64 C give fp64.

        Raises:
            ValueError: there is one target; or `correlation_ema_`, `matrix_power` or
                `asymmetric_loss_pair` rejects a shape, dtype or setting; C may have been updated
                before.
        """
        if (t1_BD is None) != (t2_BD is None):
            raise ValueError("give both targets, t1_BD and t2_BD, or neither")
        if self.training:
            update = correlation_over_ranks_ if self.gather_distributed else correlation_ema_
            update(self.corr_DD, [z1_BD.detach(), z2_BD.detach()], self.decay)
        normalize = "spectral" if self.metric == "cosine" else "none"
        w_DD = matrix_power(self.corr_DD, self.alpha, eps=self.eps, normalize=normalize)
        return 2 * asymmetric_loss_pair(
            z1_BD,
            z2_BD,
            (z1_BD if t1_BD is None else t1_BD).detach(),
            (z2_BD if t2_BD is None else t2_BD).detach(),
            w_DD,
            metric=self.metric,
            isotropic=self.isotropic,
        )

    def extra_repr(self) -> str:
        """Return the settings."""
        kind = "isotropic" if self.isotropic else "plain"
        power = f"alpha={self.alpha:g}, eps={self.eps:g}, decay={self.decay:g}"
        return f"{len(self.corr_DD)}, {self.metric}, {kind}, {power}"

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Keep C unchanged when a whole model is converted to bf16 or fp16."""
        corr_DD = self.corr_DD
        super()._apply(fn, recurse)
        if self.corr_DD.dtype in (torch.bfloat16, torch.float16):
            self.corr_DD = corr_DD.to(self.corr_DD.device)
        return self


@torch.no_grad()
def correlation_over_ranks_(corr_DD: Tensor, views: Sequence[Tensor], decay: float) -> None:
    """Update C as `correlation_ema_` does, with the rows of all ranks, which have equally many.

    Raises:
        ValueError: as for `correlation_ema_`.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        correlation_ema_(corr_DD, views, decay)
        return
    moment_DD = second_moment(as_updating_views(corr_DD, views, decay))
    dist.all_reduce(moment_DD)
    if decay == 0:
        # 0 times NaN would be NaN
        corr_DD.zero_()
    # an all-reduce may sum (i, j) and (j, i) in different orders
    moment_DD = mirror_lower(moment_DD) / dist.get_world_size()
    corr_DD.mul_(decay).add_(moment_DD, alpha=1 - decay)
