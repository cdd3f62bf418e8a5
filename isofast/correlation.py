"""The correlation matrix C of the online embeddings, and the predictor made from it."""

import torch
from torch import Tensor
from torch.nn import functional

from isofast.config import MethodConfig
from isofast.distributed import mean_over_ranks_
from isofast_kernels import correlation_ema_, matrix_power, second_moment


class Correlation:
    """C <- decay * C + (1 - decay) * mean over rows of z z^T, fp32, (D, D), starting at 0.

    With ``method.correlation`` "directions", z / |z| stands for z. One update a step, over both
    views and all ranks; bitwise symmetric. Never updated outside training.
    """

    def __init__(self, dim: int, config: MethodConfig, device: torch.device, ranks: int) -> None:
        self.corr_DD = torch.zeros(dim, dim, device=device)
        self._config = config
        self._ranks = ranks

    @torch.no_grad()
    def update(self, *views_BD: Tensor) -> None:
        """Moves C by this rank's embeddings (B, D) of each view and those of the other ranks."""
        decay = self._config.decay
        if self._config.correlation == "directions":
            views_BD = tuple(functional.normalize(z_BD.float(), dim=1) for z_BD in views_BD)
        if self._ranks == 1:
            correlation_ema_(self.corr_DD, views_BD, decay)
            return
        moment_DD = mean_over_ranks_(second_moment(views_BD))
        # a collective may add (i, j) and (j, i) in different orders
        moment_DD = moment_DD.tril() + moment_DD.tril(-1).T
        self.corr_DD.mul_(decay).add_(moment_DD, alpha=1 - decay)

    @torch.no_grad()
    def predictor(self) -> Tensor:
        """W = f(C)^alpha, symmetric, fp32 (D, D), of the methods that make it of C."""
        config = self._config
        assert config.alpha is not None and config.eps is not None and config.normalize is not None
        w_DD: Tensor = matrix_power(
            self.corr_DD, config.alpha, eps=config.eps, normalize=config.normalize
        )
        return w_DD
