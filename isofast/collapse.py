"""Collapse: what of the embeddings is lost, told from the records, and what to try against it."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from isofast.config import Config
from isofast.spectrum import Spectrum

# Healthy embeddings spread by 1/sqrt(D) in each dimension; below this share all images are one.
_LEAST_SPREAD = 0.01
# Healthy runs pass through low ranks: C is not centred, and all embeddings of a new network point
# the same way. So a low rank is told only while it falls, or where hardly a second dimension is
# left and none comes back ...
_LEAST_RANK_SHARE, _LEAST_RANK, _FALL = 0.02, 1.5, 0.9
_ONE_DIMENSION, _NO_GROWTH = 1.1, 1.01
# ... and not before the warm-up is over and C has forgotten the first steps, two of its time
# constants later.
_TIME_CONSTANTS = 2
_LEAST_STEPS = 200
# Growth of the mean squared norm since the first record, a thousandfold in the norm.
_MOST_GROWTH = 1e6


@dataclass(frozen=True)
class Finding:
    """What has collapsed, and the message that says so and what to try."""

    kind: Literal["complete", "dimensional", "blow-up"]
    message: str


class CollapseWatch:
    """Looks at each record of a run; keeps the spectra's ranks and norms.

    Args:
        config: the run's.
        steps_per_epoch: steps of one pass over the images.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self._config = config
        self._dim = config.projector.output
        memory = _TIME_CONSTANTS / (1 - config.method.decay)
        warmup = config.warmup_epochs * steps_per_epoch
        self._grace = max(memory, warmup, _LEAST_STEPS)
        self._steps: list[int] = []
        self._ranks: list[float] = []
        self._first_norm = math.nan

    def seen(self, step: int, spectrum: Spectrum) -> None:
        """Keeps what a spectrum says; in the order of the steps."""
        self._steps.append(step)
        self._ranks.append(spectrum.effective_rank)
        if not self._first_norm > 0:
            self._first_norm = self._mean_square(step, spectrum)

    def judge(self, step: int, spread: float, spectrum: Spectrum) -> Finding | None:
        """What has collapsed by ``step``; None where nothing has.

        Args:
            step: of the record; its spectrum and all before it have been ``seen``.
            spread: the record's embedding_std.
            spectrum: the record's.
        """
        norm = self._mean_square(step, spectrum)
        if not math.isfinite(norm) or norm > _MOST_GROWTH * self._first_norm:
            return self._blow_up(step, norm)
        healthy = 1 / math.sqrt(self._dim)
        if spread < _LEAST_SPREAD * healthy:
            return self._found(
                "complete",
                f"the embeddings have collapsed completely, to one point for all images: at step "
                f"{step} embedding_std is {spread:.2g}, {healthy:.2g} is healthy",
            )
        rank = spectrum.effective_rank
        if step >= self._grace and self._dimensions_are_lost(step, rank):
            return self._found(
                "dimensional",
                f"the embeddings have collapsed to few dimensions: at step {step} the effective "
                f"rank of C is {rank:.2f} of {self._dim}, after {self._rank_at(step // 2):.2f} at "
                f"step {step // 2}",
            )
        return None

    def _dimensions_are_lost(self, step: int, rank: float) -> bool:
        before = self._rank_at(step // 2)
        low = max(_LEAST_RANK, _LEAST_RANK_SHARE * self._dim)
        falls = rank < low and rank < _FALL * before
        return falls or (rank < _ONE_DIMENSION and rank <= _NO_GROWTH * before)

    def _rank_at(self, step: int) -> float:
        """The rank of the last spectrum up to ``step``, or of the first one."""
        return self._ranks[max(0, bisect_right(self._steps, step) - 1)]

    def _mean_square(self, step: int, spectrum: Spectrum) -> float:
        """Mean of |z|^2: the trace of C without the bias of its start at 0."""
        return spectrum.trace / (1 - self._config.method.decay**step)

    def _blow_up(self, step: int, norm: float) -> Finding:
        grown = f"from {math.sqrt(self._first_norm):.2g} to {math.sqrt(norm):.2g}"
        what = f"grew {grown}" if math.isfinite(norm) else "became NaN or infinite"
        return self._found("blow-up", f"blow-up at step {step}: the norms of the embeddings {what}")

    def _found(self, kind: Literal["complete", "dimensional", "blow-up"], what: str) -> Finding:
        return Finding(kind, f"{what}. Try {' or '.join(remedies(self._config, kind))}")


def remedies(config: Config, kind: str) -> list[str]:
    """What to try against a collapse of ``kind``, the likeliest for the method in use first."""
    method, optimizer = config.method, config.optimizer
    slower = [f"optimizer.lr below {optimizer.lr:g}", "a longer schedule.warmup_epochs"]
    if kind == "blow-up":
        heavier = method.metric == "cosine"
        return slower + ([f"optimizer.weight_decay above {optimizer.weight_decay:g}"] * heavier)
    tries = []
    if not method.ema and method.name == "simsiam":
        tries.append("method.name byol, which has an EMA target")
    elif not method.ema:
        tries.append("method.ema true")
    if method.name in ("directpred", "directcopy"):
        tries.append("method.name isoloss, which keeps small eigenvalues growing")
    if kind == "dimensional" and method.eps == 0:
        tries.append("method.eps 0.25, which gives small eigenvalues a share")
    lighter = f"optimizer.weight_decay below {optimizer.weight_decay:g}"
    return tries + slower[:1] + [lighter] * (optimizer.weight_decay > 0)
