"""C^alpha by matrix products: no eigendecomposition, no host sync, a fixed number of launches.

`reference.matrix_power_reference` defines what is computed; NUMERICS.md derives the algorithm and
its error. The largest eigenvalue comes from normalised squarings of C, the square root from a
coupled iteration with minimax polynomials of degree 5. This file has the algorithm; its arithmetic,
`Steps`, is in Triton in matrix_power_triton.py. Shape letters: D features, T partial sums.
"""

from typing import Protocol

from torch import Tensor

SQUARINGS = 10
"""Squarings of C for its largest eigenvalue."""

BOUND_SQUARINGS = 2
"""Squarings of C for a bound of at most D^(1/8) times its largest eigenvalue."""

DEAD = 1e-25
"""A trace or largest eigenvalue below this counts as 0; it is far above 1e-38, where fp32 becomes
subnormal and the root is wrong."""

LOW_SCALE = 2.0**11
"""A factor X is stored as fp16(X) and fp16(LOW_SCALE (X - fp16(X)))."""

SQUARE_SCALE = 2.0**14
"""Scale of C's squares, whose largest eigenvalue may be 1 / D^2, to keep them normal in fp16."""

Coefficients = tuple[tuple[float, float, float], ...]

UNSHIFTED_FLOOR = 1e-5
"""Eigenvalues from here to 1 are exact; the root of a smaller one is off by up to 3e-4 of the
bound's root."""

# rows (a, b, c) from bench/minimax.py, which leave |x - 1| <= 3.8e-8
UNSHIFTED_STEPS: Coefficients = (
    (8.376717014, -24.738441604, 18.335235867),
    (4.032616899, -3.003828111, 0.568648379),
    (3.474737031, -2.604065559, 0.523154770),
    (2.454836376, -1.804121760, 0.433526447),
    (1.911669577, -1.290167321, 0.379038866),
    (1.875016318, -1.250018131, 0.375001813),
)

SHIFTED_EPS = 0.1
"""From this eps on, three steps suffice for the spectrum after spectral normalisation."""

SHIFTED_FLOOR = 0.08
"""Below eps / (bound + eps) for every eps >= SHIFTED_EPS and a bound of up to 1.15."""

# leave |x - 1| <= 9.7e-10
SHIFTED_STEPS: Coefficients = (
    (3.582728858, -6.315245955, 3.855087599),
    (1.891038460, -1.267707365, 0.376775101),
    (1.875001411, -1.250001568, 0.375000157),
)


class Steps(Protocol):
    """The arithmetic that the algorithm needs. Triton provides it; tests emulate it.

    One object serves one C: it stores the traces of C's squares and its largest eigenvalue.
    """

    def square(self, m_DD: Tensor, index: int) -> Tensor:
        """Return (M / tr M)^2 and store tr M under `index`; M = 0 stays 0."""

    def find_largest(self, m_DD: Tensor, index: int) -> None:
        """Square M, at `index`, until SQUARINGS; store lambda_max = <N, C> / tr N of the square N
        after that. May alternate with products, but ends before `finish` needs the result.
        """

    def shift(self, m_DD: Tensor, index: int, eps: float, spectral: bool, bounded: bool) -> Tensor:
        """Return A, r A = C / lambda_max + eps I (or C + eps I), and store r; all NaN if C has one.

        If bounded, A's eigenvalues are at most 1, from |M| and the stored traces; otherwise r = 1.
        """

    def polynomial(self, p_DD: Tensor, a: float, b: float, c: float) -> Tensor:
        """Return a I + b P + c P^2."""

    def product(self, x_DD: Tensor, y_DD: Tensor) -> Tensor:
        """Return X Y."""

    def advance(self, y_DD: Tensor, q_DD: Tensor, z_DD: Tensor) -> tuple[Tensor, Tensor]:
        """Return Y Q and Q Z, which are independent."""

    def finish(self, x_DD: Tensor, y_DD: Tensor, power: float, scaled: bool) -> Tensor:
        """Return r^power X Y or (r / lambda_max)^power X Y, bitwise symmetric; X and Y commute."""


def runs_by_products(alpha: float, eps: float, normalize: str) -> bool:
    """Return whether `power_by_products` computes this power.

    alpha = 1/4 takes two roots; without a shift the second one is meaningless, because fp32 leaves
    errors of 1e-7 in eigenvalues, whose fourth root is 2e-2.
    """
    if alpha == 0.25:
        return normalize == "spectral" and eps >= SHIFTED_EPS
    return alpha in (0.5, 2.0) or (alpha == 1.0 and normalize == "spectral")


def power_by_products(
    corr_DD: Tensor, alpha: float, eps: float, normalize: str, steps: Steps
) -> Tensor:
    """W = (C / lambda_max + eps I)^alpha, or (C + eps I)^alpha, for alpha in 1/4, 1/2, 1, 2.

    Args:
        corr_DD: C, (D, D), symmetric, positive semi-definite up to fp32 rounding.
        alpha, eps, normalize: as in `matrix_power_reference`, where `runs_by_products`.
        steps: the arithmetic.

    Returns:
        w_DD, (D, D), bitwise symmetric.
    """
    spectral = normalize == "spectral"
    bounded = alpha != 1
    # lambda_max then only scales W, so the root of C / bound need not wait for it
    scaled = spectral and bounded and eps == 0
    m_DD, squares = corr_DD, BOUND_SQUARINGS if scaled or not spectral else SQUARINGS
    for index in range(squares):
        m_DD = steps.square(m_DD, index)
    if spectral:
        steps.find_largest(m_DD, squares)
    a_DD = steps.shift(m_DD, squares, eps, spectral and not scaled, bounded)
    if alpha == 1:
        return a_DD
    if alpha == 2:
        return steps.finish(a_DD, a_DD, alpha, scaled)
    shifted = spectral and eps >= SHIFTED_EPS
    coefficients = SHIFTED_STEPS if shifted else UNSHIFTED_STEPS
    if alpha == 0.25:
        # sqrt(A) is bounded by 1 like A, and its smallest eigenvalue is larger than A's
        a_DD = steps.product(*square_root(a_DD, coefficients, steps))
    return steps.finish(*square_root(a_DD, coefficients, steps), alpha, scaled)


def square_root(a_DD: Tensor, coefficients: Coefficients, steps: Steps) -> tuple[Tensor, Tensor]:
    """Return two commuting factors of sqrt(A), for A with eigenvalues in [0, 1].

    Y -> sqrt(A), Z -> 1/sqrt(A), P = Z Y -> I: each step multiplies Y and Z by
    Q = a I + b P + c P^2, the best polynomial for the interval that then holds P's spectrum.
    """
    (first, *middle, last) = coefficients
    z_DD = steps.polynomial(a_DD, *first)
    y_DD = steps.product(a_DD, z_DD)
    for abc in middle:
        q_DD = steps.polynomial(steps.product(z_DD, y_DD), *abc)
        y_DD, z_DD = steps.advance(y_DD, q_DD, z_DD)
    return y_DD, steps.polynomial(steps.product(z_DD, y_DD), *last)
