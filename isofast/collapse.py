"""Detect collapse from a run's records, and suggest what helped other runs.

The thresholds separate 22 recorded runs, good and bad (bench/results/first-steps.json); what they miss
and how late they are is in docs/method/first-steps.md.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from isofast.config import Config
from isofast.spectrum import Spectrum

Kind = Literal["complete", "dimensional", "torn", "blow-up"]

# Healthy embeddings spread by 1/sqrt(D) in each dimension; below this share all images are one ...
_LEAST_SPREAD = 0.01
# ... and below this one they fill few dimensions, unless they are still spreading.
_LOW_SPREAD, _NO_GROWTH = 0.35, 1.1
# A new network's embeddings all point the same way: wait for the warm-up to end and for C to
# forget the first steps, two of its time constants.
_TIME_CONSTANTS = 2
_LEAST_STEPS = 200
# A few embeddings this much longer than the median own a raw C, and W shortens the others so far.
_LONG, _SHORT = 4.0, 0.5
# Growth of the mean squared norm since the first record, a thousandfold in the norm.
_MOST_GROWTH = 1e6


@dataclass(frozen=True)
class Finding:
    """What has collapsed, and the message that says so and what to try."""

    kind: Kind
    message: str


class CollapseWatch:
    """Judges each record of a run by those before it.

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
        self._spreads: list[float] = []
        self._first_norm = math.nan

    def seen(self, step: int, spectrum: Spectrum) -> None:
        """Keeps the norm that a spectrum tells, if it is the first."""
        if not self._first_norm > 0:
            self._first_norm = self._mean_square(step, spectrum)

    def recorded(self, record: Mapping[str, float | int | None]) -> None:
        """Keeps a record's embedding_std; in the order of the steps."""
        self._steps.append(int(record["step"] or 0))
        self._spreads.append(record["embedding_std"] or 0.0)

    def judge(self, record: Mapping[str, float | int | None], spectrum: Spectrum) -> Finding | None:
        """What has collapsed by this record's step; None where nothing has.

        Args:
            record: step, embedding_std, norm_spread and prediction_norm; becomes ``recorded``.
            spectrum: C's at that step, and ``seen``.
        """
        self.recorded(record)
        step, spread = self._steps[-1], self._spreads[-1]
        norm = self._mean_square(step, spectrum)
        if not math.isfinite(norm) or norm > _MOST_GROWTH * self._first_norm:
            return self._blow_up(step, norm)
        healthy = 1 / math.sqrt(self._dim)
        measured = f"at step {step} embedding_std is {spread:.2g}, {healthy:.2g} is healthy"
        if spread < _LEAST_SPREAD * healthy:
            return self._found(
                "complete", f"the embeddings of all images have become one point: {measured}"
            )
        method = self._config.method
        long, short = record.get("norm_spread") or 0.0, record.get("prediction_norm") or 1.0
        raw = method.predictor == "closed" and method.correlation == "embeddings"
        if raw and long > _LONG and short < _SHORT:
            return self._found(
                "torn",
                f"a few long embeddings own C: at step {step} they are {long:.1f} times as long as "
                f"the median, and W shortens the others to {short:.2f}",
            )
        before = self._spreads[max(0, bisect_right(self._steps, step // 2) - 1)]
        if step >= self._grace and spread < min(_LOW_SPREAD * healthy, _NO_GROWTH * before):
            return self._found(
                "dimensional",
                f"the embeddings have collapsed to few dimensions: {measured}, and the effective "
                f"rank of C is {spectrum.effective_rank:.1f} of {self._dim}",
            )
        return None

    def _mean_square(self, step: int, spectrum: Spectrum) -> float:
        """Mean of |z|^2: the trace of C without the bias of its start at 0."""
        return spectrum.trace / (1 - self._config.method.decay**step)

    def _blow_up(self, step: int, norm: float) -> Finding:
        grown = f"from {math.sqrt(self._first_norm):.2g} to {math.sqrt(norm):.2g}"
        what = f"grew {grown}" if math.isfinite(norm) else "became NaN or infinite"
        return self._found("blow-up", f"blow-up at step {step}: the norms of the embeddings {what}")

    def _found(self, kind: Kind, what: str) -> Finding:
        return Finding(kind, f"{what}. Try {' or '.join(remedies(self._config, kind))}")


def remedies(config: Config, kind: Kind) -> list[str]:
    """What to try against a collapse of ``kind``: only what ended one in a recorded run."""
    method, optimizer = config.method, config.optimizer
    slower = [f"optimizer.lr below {optimizer.lr:g}", "a longer schedule.warmup_epochs"]
    if kind == "blow-up":
        return slower
    tries = []
    if method.predictor == "closed" and method.metric == "cosine":
        if method.correlation == "embeddings":
            tries.append("method.correlation directions, so that long embeddings don't own C")
        if not method.ema and method.decay > 0.5:
            tries.append("method.decay 0.5, because C must keep up where there is no EMA target")
    if method.name in ("directpred", "directcopy"):
        tries.append("method.name isoloss, which keeps small eigenvalues growing")
    if not method.ema:
        name = "method.name byol" if method.name == "simsiam" else "method.ema true"
        tries.append(f"{name}, for an EMA target")
    if method.predictor != "closed" and optimizer.name != "sgd":
        tries.append("optimizer.name sgd")
    return tries or slower
