"""Compute the polynomials of the square-root iteration.

`python bench/minimax.py` prints the tables of kernels/matrix_power.py; a test compares them.

The iteration drives x = sqrt(eigenvalue) towards 1: x <- x (a + b x^2 + c x^4). For x in [l, u],
the Remez exchange finds the odd quintic with the smallest maximum deviation e from 1; it maps
[l, u] onto [1 - e, 1 + e], the interval for the next step's polynomial.
"""

import sys

import torch

from isofast_kernels.matrix_power import (
    SHIFTED_FLOOR,
    SHIFTED_STEPS,
    UNSHIFTED_FLOOR,
    UNSHIFTED_STEPS,
    Coefficients,
)


def minimax_steps(floor: float, steps: int) -> tuple[Coefficients, float]:
    """Return the polynomials (a, b, c) for eigenvalues in [floor, 1], and the final max |x - 1|."""
    low, high, deviation, found = floor**0.5, 1.0, 1.0, []
    for _ in range(steps):
        (a, b, c), deviation = minimax_quintic(low / high)
        found.append((a / high, b / high**3, c / high**5))
        low, high = 1 - deviation, 1 + deviation
    return tuple(found), deviation


def minimax_quintic(low: float) -> tuple[tuple[float, float, float], float]:
    """Return (a, b, c) with the smallest e = max |a x + b x^3 + c x^5 - 1| over [low, 1], and e.

    Remez exchange: solve for equal deviations of alternating sign at four points, move the two
    inner points to where the derivative is zero, repeat.
    """
    sign_4 = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    angle_4 = torch.arange(4, dtype=torch.float64) * torch.pi / 3
    x_4 = (low + 1) / 2 - (1 - low) / 2 * torch.cos(angle_4)
    for _ in range(100):
        system_44 = torch.stack([x_4, x_4**3, x_4**5, sign_4], dim=1)
        a, b, c, e = torch.linalg.solve(system_44, torch.ones_like(x_4)).tolist()
        # a + 3 b y + 5 c y^2 = 0 for y = x^2
        root = (9 * b * b - 20 * a * c) ** 0.5
        inner = sorted(((-3 * b + s * root) / (10 * c)) ** 0.5 for s in (1, -1))
        moved_4 = torch.tensor([low, *inner, 1.0], dtype=torch.float64)
        settled = torch.allclose(moved_4, x_4, rtol=1e-13, atol=0)
        x_4 = moved_4
        if settled:
            break
    return (a, b, c), abs(e)


if __name__ == "__main__":
    for name, floor, steps in (
        ("UNSHIFTED_STEPS", UNSHIFTED_FLOOR, len(UNSHIFTED_STEPS)),
        ("SHIFTED_STEPS", SHIFTED_FLOOR, len(SHIFTED_STEPS)),
    ):
        table, deviation = minimax_steps(floor, steps)
        rows = "".join(f"    ({a:.9f}, {b:.9f}, {c:.9f}),\n" for a, b, c in table)
        sys.stdout.write(f"# leaves {deviation:.1e}\n{name}: Coefficients = (\n{rows})\n")
