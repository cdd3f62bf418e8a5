"""The correlation matrix C of the online embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from isofast.config.schema import MethodConfig
from isofast_kernels.iso_loss import correlation_over_ranks_


class Correlation(nn.Module):
    """C <- decay * C + (1 - decay) * mean over rows of z z^T, starting at 0, bitwise symmetric.

    If ``correlation`` is "directions", z / |z| replaces z.

    Attributes:
        corr_DD: C, fp32 (D, D), a buffer.
    """

    corr_DD: Tensor

    def __init__(self, dim: int, config: MethodConfig) -> None:
        super().__init__()
        self.register_buffer("corr_DD", torch.zeros(dim, dim))
        self._decay, self._of = config.decay, config.correlation

    @torch.no_grad()
    def update(self, *views_BD: Tensor) -> None:
        """Update C with the embeddings (B, D) of all views and ranks."""
        if self._of == "directions":
            views_BD = tuple(functional.normalize(z_BD.float(), dim=1) for z_BD in views_BD)
        correlation_over_ranks_(self.corr_DD, views_BD, self._decay)
