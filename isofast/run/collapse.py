"""Detect collapse in a run's records, and suggest what to try.

The thresholds separate good from bad recorded runs (bench/results/first-steps.json).
docs/method/first-steps.md says what they miss, and how late they trigger.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from isofast.config.schema import Config, MethodConfig
from isofast.run.loggers import Record

Kind = Literal["complete", "dimensional", "torn", "blow-up"]

# As fractions of the healthy spread 1/sqrt(D): below the first, all images are one point; below
# the second, they fill few dimensions, unless the spread still grows by more than _NO_GROWTH and
# C has at least _LEAST_RANK of them.
_LEAST_SPREAD, _LOW_SPREAD, _NO_GROWTH, _LEAST_RANK = 0.01, 0.35, 1.1, 2.0
# A new network's embeddings all point the same way. Wait for the warm-up, or a quarter of it if it
# is long (healthy runs needed 140 of 1,950 steps), and until C has forgotten the first steps.
_TIME_CONSTANTS, _LEAST_STEPS, _WARMUP_STEPS, _WARMUP_SHARE = 2, 200, 500, 0.25
# 95th percentile of |z| / median, and median |W z| / |z|, where the longest dominate a raw C.
_LONG, _SHORT = 4.0, 0.5
# Maximum growth of the embeddings' norm since the first record.
_MOST_GROWTH = 1e3


@dataclass(frozen=True)
class Finding:
    """A collapse, with a message that explains it and says what to try."""

    kind: Kind
    message: str


class CollapseWatch:
    """Judges each record of a run against the earlier ones.

    Attributes:
        grace: steps before which few dimensions are not called a collapse.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self._config = config
        self._dim = config.projector.output
        warmup = config.warmup_epochs * steps_per_epoch
        warmup = min(warmup, max(_WARMUP_STEPS, _WARMUP_SHARE * warmup))
        self.grace = max(warmup, _TIME_CONSTANTS / (1 - config.method.decay), _LEAST_STEPS)
        self._steps: list[int] = []
        self._spreads: list[float] = []
        self._first_norm: float | None = None
        self._torn = 0

    def judge(self, record: Record) -> Finding | None:
        """Return the collapse that the next record of metrics.jsonl shows, or None."""
        step, spread, norm = record["step"], record["embedding_std"], record.get("embedding_norm")
        assert step is not None
        if self._first_norm is None:
            self._first_norm = norm
        if spread is None or not math.isfinite(spread):
            return self._found("blow-up", f"the embeddings became NaN or infinite at step {step}")
        self._steps.append(int(step))
        self._spreads.append(spread)
        if norm is not None and norm > _MOST_GROWTH * (self._first_norm or math.inf):
            return self._found(
                "blow-up",
                f"the embeddings' norm grew from {self._first_norm:.2g} to {norm:.2g} by "
                f"step {step}",
            )
        healthy = 1 / math.sqrt(self._dim)
        measured = f"at step {step} embedding_std is {spread:.2g} (healthy: {healthy:.2g})"
        if spread < _LEAST_SPREAD * healthy:
            return self._found(
                "complete", f"the embeddings have collapsed completely, to one point: {measured}"
            )
        if self._is_torn(record):
            return self._found(
                "torn",
                f"a few long embeddings dominate C: at step {step} the longest twentieth are at "
                f"least {record['norm_spread']:.1f} times as long as the median, and the median of "
                f"|W z| / |z| is {record['prediction_norm']:.2f}",
            )
        is_low = step >= self.grace and spread < _LOW_SPREAD * healthy
        rank = record["effective_rank"] or math.inf
        if is_low and (rank < _LEAST_RANK or self._has_stopped(spread)):
            return self._found(
                "dimensional",
                f"the embeddings have collapsed to few dimensions: {measured}, and the effective "
                f"rank of C is {rank:.1f} of {self._dim}",
            )
        return None

    def _is_torn(self, record: Record) -> bool:
        """Whether long embeddings dominate C in two consecutive records."""
        long, short = record.get("norm_spread"), record.get("prediction_norm")
        if not _is_cosine_of_raw_c(self._config.method) or long is None or short is None:
            return False
        self._torn = self._torn + 1 if long > _LONG and short < _SHORT else 0
        return self._torn > 1

    def _has_stopped(self, spread: float) -> bool:
        """Whether the spread has hardly grown over the second half of the steps."""
        half = bisect_right(self._steps, self._steps[-1] // 2)
        return half > 0 and spread < _NO_GROWTH * self._spreads[half - 1]

    def _found(self, kind: Kind, what: str) -> Finding:
        return Finding(kind, f"{what}. Try {' or '.join(remedies(self._config, kind))}")


def _is_cosine_of_raw_c(method: MethodConfig) -> bool:
    """Whether long embeddings weigh more in W, although the loss ignores their length."""
    cosine = hasattr(method, "alpha") and getattr(method, "metric", None) == "cosine"
    return cosine and method.correlation == "embeddings"


def remedies(config: Config, kind: Kind) -> list[str]:
    """Return what to try against this ``kind`` of collapse, most promising first."""
    method, optimizer = config.method, config.optimizer
    slower = [f"optimizer.lr below {optimizer.lr:g}", "a longer schedule.warmup_epochs"]
    if kind == "blow-up":
        return slower
    tries = []
    if _is_cosine_of_raw_c(method):
        tries.append("method.correlation directions, so that long embeddings don't dominate C")
    if method.name in ("directpred", "directcopy"):
        tries.append("method.name isoloss, which lets small eigenvalues keep growing")
    if hasattr(method, "alpha") and not method.ema:
        tries.append("method.ema true, for an EMA target")
    # C's rank grew with the number of steps (bench/results/first-steps.md)
    return tries or (["more train.epochs"] if kind == "dimensional" else slower)
