"""The settings of a toy network: which loss, which ablation, which sizes. Needs no torch."""

import math
from dataclasses import dataclass

from isofast.errors import UserError

LOSSES = ("euclidean", "iso_euclidean", "cosine", "iso_cosine")
SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One linear or ReLU layer trained without labels (P Section 4, Fig. 2, 5 and 6).

    A view x of ``inputs`` numbers gives z = V x, or z = relu(V x), of ``outputs`` numbers. The
    predictor is W = V V^T, or W = I.

    Attributes:
        loss: "euclidean", "iso_euclidean", "cosine" or "iso_cosine" (P Table 1).
        stop_gradient: whether the target side is held constant.
        predictor: W = V V^T, held constant in every gradient; W = I without.
        relu: put a ReLU on the embeddings.
        paper_gradient: of the cosine without stop-gradient, the form of P App. C.2 in place of
            the derivative.
        inputs: N, the length of x.
        outputs: M, the length of z.
        steps: of gradient descent; None for 1,500, without predictor 100,000.
        samples: fresh pairs of views a step, where the population gradient has no closed form.
        lr: learning rate; None for 0.1, for the Euclidean losses with a predictor 0.01.
        seed: of the initialisation and of the samples.

    Raises:
        UserError: a value out of its range, or two that do not go together.
    """

    loss: str = "euclidean"
    stop_gradient: bool = True
    predictor: bool = True
    relu: bool = False
    paper_gradient: bool = False
    inputs: int = 15
    outputs: int = 10
    steps: int | None = None
    samples: int = 1000
    lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss: got {self.loss!r}; choose one of {', '.join(LOSSES)}")
        for name in ("inputs", "outputs", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}; give a number of at least 1")
        if self.steps is not None and self.steps < 0:
            raise UserError(f"steps: got {self.steps}; give 0 or more")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr: got {self.lr}; give a finite number above 0, such as 0.01")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed: got {self.seed}; give a number from 0 to 2^63 - 1")
        self._check_ablations()

    def _check_ablations(self) -> None:
        if self.isotropic and not (self.stop_gradient and self.predictor):
            missing = "predictor" if self.stop_gradient else "stop-gradient"
            raise UserError(
                f"loss: got {self.loss!r} without {missing}; IsoLoss is defined with both alone. "
                f"Use {self.metric!r} for this ablation"
            )
        if self.paper_gradient and self.stop_gradient:
            raise UserError(
                "paper_gradient: got it with a stop-gradient, where the paper's derivative is the "
                "true one; add --no-stop-gradient or leave --paper-gradient"
            )
        if self.paper_gradient and self.metric != "cosine":
            raise UserError(
                f"paper_gradient: got it with loss {self.loss!r}; the paper's derivative differs "
                "from the true one for 'cosine' alone"
            )

    @property
    def metric(self) -> str:
        """ "euclidean" or "cosine"."""
        return self.loss.removeprefix("iso_")

    @property
    def isotropic(self) -> bool:
        """Whether the loss is an IsoLoss."""
        return self.loss.startswith("iso_")

    @property
    def exact(self) -> bool:
        """Whether the population gradient has a closed form here, so that nothing is sampled."""
        alone = self.stop_gradient and not self.predictor
        return self.metric == "euclidean" and (not self.relu or alone)

    @property
    def default_steps(self) -> int:
        """``steps``, or how many this loss is given in the paper's figures."""
        if self.steps is not None:
            return self.steps
        return 1500 if self.predictor else 100_000

    @property
    def default_lr(self) -> float:
        """``lr``, or the one this loss has in the paper's pictures of spectra."""
        if self.lr is not None:
            return self.lr
        return 0.01 if self.metric == "euclidean" and self.predictor else 0.1

    @property
    def matrix(self) -> str:
        """The matrix whose eigenvalues describe the embeddings: their correlation C."""
        return "E[z z^T], z = relu(V x)" if self.relu else "V V^T"

    def describe(self) -> str:
        """The network in words."""
        words = [self.loss] if self.stop_gradient else [self.loss, "without stop-gradient"]
        if self.paper_gradient:
            words.append("(the paper's form, not the derivative)")
        if not self.predictor:
            words.append("without predictor")
        kind = "ReLU" if self.relu else "linear"
        return f"{' '.join(words)}, {kind} {self.inputs} -> {self.outputs}"
